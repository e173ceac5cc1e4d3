"""A run's settings as plain values: which of them make it another run, and where two differ."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.train_config import TrainConfig

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
