"""A run's settings as plain values: which of them make it another run, and where two differ."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from mlx_mla.errors import UserError, shown
from mlx_mla.fields import Bounds, typed
from mlx_mla.model.config import ModelConfig, TrainConfig, nearest

T = TypeVar("T")

Settings = dict[str, Any]
"""Names (`model.n_embd` for the model's own) to values, of a resolved configuration."""

NEUTRAL = frozenset(
    {
        *("preset", "data", "bpe_dir", "device", "activation_checkpointing", "tokens_per_step"),
        *("log_every", "eval_every", "save_every", "keep", "track"),
        *("sample_prompt", "sample_tokens", "sample_every"),
        *("eval_tasks", "eval_limit", "eval_data_dir"),
    }
)
"""What does not change the resulting weights: paths, the device, logging. Data are identified by
their fingerprint."""


def settings(config: TrainConfig) -> Settings:
    """Everything that makes a run what it is; two runs of equal settings are one."""
    values = dataclasses.asdict(config)
    model = {f"model.{name}": value for name, value in values.pop("model").items()}
    return {**{k: v for k, v in values.items() if k not in NEUTRAL}, **model}


def filled(values: Mapping[str, Any]) -> Settings:
    """Settings that were saved before a field existed, with that field at its default.

    Settings that the present version does not have are returned as they are, and match no run.
    """
    model = {k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")}
    others = {k: v for k, v in values.items() if not k.startswith("model.")}
    try:
        return settings(TrainConfig(model=ModelConfig(**model), **others).resolved())
    except (TypeError, UserError):  # a field that is gone, or a value that is refused by now
        return dict(values)


def key(values: Mapping[str, Any]) -> str:
    """Settings as text that can be compared and looked up."""
    return json.dumps(values, sort_keys=True)


def differences(base: Settings, other: Settings) -> dict[str, tuple[Any, Any]]:
    """Every setting in which two configurations differ: (base's, other's)."""
    return {k: (base[k], other[k]) for k in base if base[k] != other[k]}


def table(cls: type[T], values: Any, where: str, bounds: Mapping[str, Bounds] = {}) -> T:
    """A dataclass from a table of TOML or JSON.

    Args:
        values: Must be a mapping with the names of the class's fields.
        where: Name of its source, for messages.
        bounds: Of fields that are numbers or lists of numbers.

    Raises:
        UserError: For an unknown or missing key, or a value of another type or out of bounds.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a table, not {shown(values)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown key {shown(name)}; {nearest(name, fields)}")
    found = typed(cls, values, where)
    for name, limit in bounds.items():
        value = found.get(name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (problem := limit.problem(number)):
                raise UserError(f"{where}: {name} {problem}")
    try:
        return cls(**found)
    except TypeError:
        unset = (dataclasses.MISSING, dataclasses.MISSING)
        required = [n for n, f in fields.items() if (f.default, f.default_factory) == unset]
        missing = next(name for name in required if name not in found)
        raise UserError(f"{where}: {missing} is missing") from None
