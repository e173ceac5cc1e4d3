"""The typed, bounded reader: whatever this project reads from its own files passes through here.

A dataclass or a TypedDict describes a record. Its annotations are the types, and `Annotated` adds
bounds. Types are checked at every depth; numbers are finite, and whole numbers have 64 bits.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Part:
        file: FileName                       # required: no default
        tokens: Count
        loss: Optional[float] = None         # None also where the file says null

    class Line(TypedDict):                   # records that stay dicts
        step: Count
        part: NotRequired[Part]

    read(Part, folder / "part.json")                    # a JSON object, or TOML by the suffix
    value_of(list[Part], values, f"{path}: parts")      # values that were parsed already
    [value_of(Line, v, where) for where, v in json_lines(folder / "lines.jsonl")]

An error names the file, the line and the field: `lines.jsonl, line 3: part.tokens must not be
negative, not -1; remove the line`. A dataclass drops keys that it has no field for; a TypedDict
keeps them and checks them as `Any`; with `known_only` both refuse them, which suits files that
users write. A `__post_init__` may raise ValueError for fields that contradict each other.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Optional,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mlx_mla.errors import UserError, flag, nearest, shown
from mlx_mla.files import encodable, read_json, read_toml

T = TypeVar("T")
_NONE = type(None)
_JSON_TYPES = (dict, list, str, bool, int, float, _NONE)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a number; NaN and infinity are outside every range."""

    must: str
    """Completes the message for a value below `low`, such as "be at least 1"."""
    low: float
    high: float = math.inf
    must_above: str | None = None
    """The same for a value above `high`. None: "be at most" and `high`."""

    def problem(self, value: float) -> Optional[str]:
        """Why a value is refused, to follow the name of its field; None if it is within bounds."""
        if not isinstance(value, int) and not math.isfinite(value):
            return f"must be a finite number, not {value}"
        if value < self.low:
            return f"must {self.must}, not {shown(value)}"
        if value > self.high:
            most = f"be at most {self.high:{',' if isinstance(self.high, int) else 'g'}}"
            return f"must {self.must_above or most}, not {shown(value)}"
        return None


@dataclasses.dataclass(frozen=True)
class Form:
    """What a text must look like."""

    must: str
    """Completes the message for any other text, such as "be a sha256"."""
    pattern: str
    """Regular expression of the whole text."""

    def problem(self, value: str) -> Optional[str]:
        """As `Bounds.problem`."""
        if re.fullmatch(self.pattern, value, re.DOTALL):
            return None
        return f"must {self.must}, not {shown(value)}"


def at_least_1(high: float = math.inf) -> Bounds:
    """Numbers from 1."""
    return Bounds("be at least 1", 1, high)


def not_negative(high: float = math.inf) -> Bounds:
    """Numbers from 0."""
    return Bounds("not be negative", 0, high)


def positive(high: float = math.inf) -> Bounds:
    """Numbers above 0."""
    return Bounds("be positive", math.nextafter(0, 1), high)


def fraction(must: str = "be from 0 to 1", above_0: bool = False, below_1: bool = False) -> Bounds:
    """Numbers from 0 to 1, with or without the ends."""
    low, high = math.nextafter(0, 1) if above_0 else 0, math.nextafter(1, 0) if below_1 else 1
    return Bounds(must, low, high, must)


def between(low: float, high: float, hint: str = "") -> Bounds:
    """Numbers from `low` to `high`.

    Args:
        hint: What a value means, such as "0 is off", for messages.
    """
    must = f"be from {low:.10g} to {high:.10g}" + (f" ({hint})" if hint else "")
    return Bounds(must, low, high, must)


Count = Annotated[int, not_negative()]
PositiveInt = Annotated[int, at_least_1()]
PositiveFloat = Annotated[float, positive()]
NonNegativeFloat = Annotated[float, not_negative()]
OpenFraction = Annotated[float, fraction("be between 0 and 1", above_0=True, below_1=True)]
Name = Annotated[str, Form("be text without control characters", r"[^\x00-\x1f]+")]
FileName = Annotated[
    str, Form("be the name of a file in the same folder", r"(?!\.{1,2}$)[^/\\\x00-\x1f]{1,255}")
]
Sha256 = Annotated[str, Form("be a sha256", "[0-9a-f]{64}")]


def check_bounds(settings: Any) -> None:
    """Check the numbers of a settings dataclass, those in its lists included.

    Raises:
        UserError: Naming the flag of a field that is out of its bounds.
    """
    for name, limit in bounds_of(type(settings)).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and (problem := limit.problem(number)):
                raise UserError(f"{flag(name)} {problem}")


def bounds_of(cls: type) -> dict[str, Bounds]:
    """The bounds of a dataclass's numbers, by field."""

    def found(wanted: Any) -> Iterator[Bounds]:
        if isinstance(wanted, Bounds):
            yield wanted
        for inner in get_args(wanted):
            yield from found(inner)

    limits = {name: next(found(wanted), None) for name, wanted in _annotations(cls).items()}
    return {name: limit for name, limit in limits.items() if limit is not None}


def typed(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values that belong to fields of a settings dataclass, each of its field's type.

    Other keys are left out, and missing fields are not an error.

    Args:
        values: As JSON or TOML gives them.
        where: Name of their source, for messages.

    Raises:
        UserError: For a value of another type.
    """
    found = {}
    for name, wanted in _annotations(cls).items():
        if name in values:
            if isinstance(values[name], str) and "\0" in values[name]:
                raise UserError(f"{where}: {name} = {shown(values[name])} must hold no NUL")
            found[name] = value_of(wanted, values[name], where, at=name)
    return found


def read(record: type[T], path: Path, remedy: str = "", *, known_only: bool = False) -> T:
    """The record in a JSON file, or in a TOML file by its suffix.

    Args:
        record: A dataclass or a TypedDict.
        remedy: What to do about a damaged file, to end the message with.
        known_only: Refuse keys that the record has no field for.

    Raises:
        UserError: If the file cannot be read or parsed, or does not hold such a record.
    """
    values = read_toml(path) if path.suffix == ".toml" else read_json(path)
    found: T = value_of(record, values, str(path), remedy, known_only=known_only)
    return found


def value_of(
    wanted: Any,
    value: Any,
    where: str,
    remedy: str = "",
    *,
    at: str = "",
    known_only: bool = False,
) -> Any:
    """A parsed value as a type: JSON's lists become tuples and its objects dataclasses where the
    type says so, and whole numbers become floats where a float belongs.

    Args:
        wanted: Made of bool, int, float, str, None, Any, Literal, Optional, Union,
            list, tuple, dict of str, dataclasses, TypedDicts, and Annotated with Bounds or Form.
        value: As JSON or TOML gives it.
        where: Name of its source, for messages.
        remedy: What to do about it, to end the message with.
        at: The field that the value belongs to, for messages.
        known_only: Refuse keys that a record has no field for.

    Raises:
        UserError: If it is of another type, or outside its bounds.
    """
    try:
        return _Reader(known_only).convert(wanted, value)
    except _Mismatch as e:
        problem = e.message(at)
    except RecursionError:
        problem = "is nested too deeply"
    raise UserError(f"{where}: {problem}" + (f"; {remedy}" if remedy else ""))


class _Mismatch(ValueError):
    """A value that its type does not have; gathers the path to it on its way out."""

    def __init__(self, problem: str, *path: str | int):
        self.problem, self.path = problem, list(path)

    def message(self, at: str) -> str:
        for step in self.path:
            if isinstance(step, int):
                at += f"[{step}]"
            else:
                name = step if re.fullmatch(r"[\w-]{1,60}", step) else shown(step)
                at += f".{name}" if at else name
        return f"{at} {self.problem}" if at else self.problem.removeprefix("= ")


class _Reader:
    def __init__(self, known_only: bool):
        self.known_only = known_only

    def convert(self, wanted: Any, value: Any) -> Any:
        origin, args = get_origin(wanted), get_args(wanted)
        if origin is Annotated:
            return self._bounded(args[0], args[1:], value)
        if origin in (Required, NotRequired):
            return self.convert(args[0], value)
        if origin in (Union, UnionType):
            return self._one_of(wanted, args, value)
        if origin is Literal:
            if any(type(value) is type(known) and value == known for known in args):
                return value
        elif origin is dict or wanted is dict:
            if isinstance(value, dict):
                inner = args[1] if args else Any
                return {_scalar(str, k): self._inside(k, inner, v) for k, v in value.items()}
        elif origin in (list, tuple) or wanted in (list, tuple):
            if isinstance(value, list):
                return self._items(origin or wanted, args, value)
        elif dataclasses.is_dataclass(wanted) or is_typeddict(wanted):
            if isinstance(value, dict):
                return self._record(wanted, value)
        elif wanted is Any:
            for known in _JSON_TYPES:
                if isinstance(value, known):
                    return self.convert(known, value)
            raise _Mismatch(f"= {shown(value)} is not a value that JSON has")
        elif wanted in (int, float, str):
            return _scalar(wanted, value)
        elif type(value) is (_NONE if wanted is None else wanted):
            return value
        raise _Mismatch(f"= {shown(value)} is not {_describe(wanted)}")

    def _inside(self, step: str | int, wanted: Any, value: Any) -> Any:
        try:
            return self.convert(wanted, value)
        except _Mismatch as e:
            e.path.insert(0, step)
            raise

    def _bounded(self, wanted: Any, limits: tuple[Any, ...], value: Any) -> Any:
        found = self.convert(wanted, value)
        for limit in limits:
            checked = isinstance(limit, Bounds | Form) and found is not None
            if checked and (problem := limit.problem(found)):
                raise _Mismatch(problem)
        return found

    def _one_of(self, wanted: Any, options: tuple[Any, ...], value: Any) -> Any:
        others = [option for option in options if option is not _NONE]
        if value is None and len(others) < len(options):
            return None
        if len(others) == 1:
            return self.convert(others[0], value)
        for option in others:
            try:
                return self.convert(option, value)
            except _Mismatch:
                continue
        raise _Mismatch(f"= {shown(value)} is not {_describe(wanted)}")

    def _items(self, wanted: type, args: tuple[Any, ...], value: list[Any]) -> Any:
        if wanted is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise _Mismatch(f"= {shown(value)} must have {len(args)} items")
            inner = args
        else:
            inner = (args[0] if args else Any,) * len(value)
        return wanted(self._inside(i, own, v) for i, (own, v) in enumerate(zip(inner, value)))

    def _record(self, record: Any, values: dict[str, Any]) -> Any:
        fields, needed = _annotations(record), _needed(record)
        if missing := next(
            (name for name in fields if name in needed and name not in values), None
        ):
            raise _Mismatch("is missing", missing)
        others = [_scalar(str, key) for key in values if key not in fields]
        if others and self.known_only:
            raise _Mismatch(f"is an unknown key; {nearest(others[0], fields)}", others[0])
        if is_typeddict(record):
            return {key: self._inside(key, fields.get(key, Any), v) for key, v in values.items()}
        found = {k: self._inside(k, fields[k], v) for k, v in values.items() if k in fields}
        try:
            return record(**found)
        except ValueError as e:
            if isinstance(e, _Mismatch):
                raise
            raise _Mismatch(str(e)) from None


def _scalar(wanted: type, value: Any) -> Any:
    if wanted is str and isinstance(value, str):
        if encodable(value):
            return value
        raise _Mismatch(f"= {shown(value)} holds half a character (a lone surrogate)")
    if wanted is not str and isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise _Mismatch(f"must be a number of at most 64 bits, not {shown(value)}")
        return wanted(value)
    if wanted is float and isinstance(value, float):
        if math.isfinite(value):
            return value
        raise _Mismatch(f"must be a finite number, not {value}")
    raise _Mismatch(f"= {shown(value)} is not {_describe(wanted)}")


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    """Annotations of a record's fields."""
    hints = get_type_hints(cls, include_extras=True)
    if is_typeddict(cls):
        return hints
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def _needed(cls: Any) -> frozenset[str]:
    """Fields that a record must have."""
    if is_typeddict(cls):
        return frozenset(cls.__required_keys__)
    missing = dataclasses.MISSING
    return frozenset(
        field.name
        for field in dataclasses.fields(cls)
        if field.default is missing and field.default_factory is missing
    )


def _describe(wanted: Any) -> str:
    origin, args = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        return _describe(args[0])
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if dataclasses.is_dataclass(wanted) or is_typeddict(wanted) or origin is dict or wanted is dict:
        return "a table of names and values"
    options = [t for t in (args if origin in (Union, UnionType) else (wanted,)) if t is not _NONE]
    if len(options) == 1 and options[0] is not wanted:
        return _describe(options[0])
    return "a value of type " + " or ".join(map(_name, options))


def _name(wanted: Any) -> str:
    origin, args = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        return _name(args[0])
    if origin is tuple and ... not in args:
        return f"list of {len(args)} items"
    if origin in (list, tuple):
        return f"list of {_name(args[0])}"
    if dataclasses.is_dataclass(wanted):
        return "table"
    return str(wanted) if origin else wanted.__name__
