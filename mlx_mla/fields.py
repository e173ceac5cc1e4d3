"""Values for the fields of settings, checked by type and by range before anything uses them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Optional, get_args, get_origin

from mlx_mla.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The values that a number may have; NaN is none, and infinity neither."""

    must: str
    """Reported for a value below `low`: "be at least 1"."""
    low: float
    high: float = math.inf
    must_above: str | None = None
    """The same for a value above `high`. None: "be at most" and `high`."""

    def problem(self, value: float) -> Optional[str]:
        """Why a value is refused, to follow the name of its field; None if it is not."""
        if not isinstance(value, int) and not math.isfinite(value):
            return f"must be a finite number, not {value}"
        if value < self.low:
            return f"must {self.must}, not {shown(value)}"
        if value > self.high:
            most = f"be at most {self.high:{',' if isinstance(self.high, int) else 'g'}}"
            return f"must {self.must_above or most}, not {shown(value)}"
        return None


def at_least_1(high: int) -> Bounds:
    """Whole numbers from 1 on."""
    return Bounds("be at least 1", 1, high)


def not_negative(high: float = math.inf) -> Bounds:
    """Numbers from 0 on."""
    return Bounds("not be negative", 0, high)


def positive(high: float = math.inf) -> Bounds:
    """Numbers above 0."""
    return Bounds("be positive", math.nextafter(0, 1), high)


def fraction(must: str = "be from 0 to 1", above_0: bool = False, below_1: bool = False) -> Bounds:
    """Numbers from 0 to 1, with or without the ends."""
    low, high = math.nextafter(0, 1) if above_0 else 0, math.nextafter(1, 0) if below_1 else 1
    return Bounds(must, low, high, must)


def check_bounds(settings: Any, bounds: Mapping[str, Bounds]) -> None:
    """UserError, naming the flag, for a field of a settings object that is out of its bounds; None
    is within all."""
    for name, limit in bounds.items():
        value = getattr(settings, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (problem := limit.problem(number)):
                raise UserError(f"--{name.replace('_', '-')} {problem}")


def typed(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of those names that are fields of a dataclass, each of the field's type.

    Whole numbers become floats where a float belongs.

    Args:
        values: As JSON or TOML gives them.
        where: Name of their source, for messages.

    Raises:
        UserError: For a value of another type.
    """
    found = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, expected = values[field.name], field.type
        if not _is_instance(value, expected):
            raise UserError(f"{where}: {field.name} = {shown(value)} is not {_describe(expected)}")
        if expected is float and isinstance(value, int):
            try:
                value = float(value)
            except OverflowError:
                value = math.inf
        found[field.name] = value
    return found


def _is_instance(value: Any, expected: Any) -> bool:
    if get_origin(expected) is Literal:
        return isinstance(value, str) and value in get_args(expected)
    if get_origin(expected) is list:
        (item,) = get_args(expected)
        return isinstance(value, list) and all(_is_instance(v, item) for v in value)
    if options := get_args(expected):
        return any(_is_instance(value, option) for option in options)
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def _describe(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return "one of " + ", ".join(map(repr, get_args(expected)))
    options = [t for t in (get_args(expected) or (expected,)) if t is not type(None)]
    if len(options) == 1 and get_origin(options[0]) is Literal:
        return _describe(options[0])
    return "a value of type " + " or ".join(
        str(t) if get_origin(t) else t.__name__ for t in options
    )
