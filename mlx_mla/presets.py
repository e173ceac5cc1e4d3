"""Where settings come from: presets, TOML files, and how one overlays another."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w

from mlx_mla.config import TOKENIZER_IDS, ModelConfig, TrainConfig, nearest
from mlx_mla.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MLA_124M: dict[str, Any] = {
    "tokenizer": "gpt2",
    "steps": 19073,
    "batch_size": 4,
    "tokens_per_step": 524288,  # the original's
    "warmup_steps": 715,
    "dtype": "bfloat16",
    "eval_every": 250,
    "eval_batches": 40,
    "final_eval_batches": 640,
    "save_every": 250,
    "model": {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "n_positions": 1024,
        "vocab_size": TOKENIZER_IDS["gpt2"],
    },
}


def _with_model(preset: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {**preset, "model": {**preset["model"], **model}}


PRESETS: dict[str, dict[str, Any]] = {
    # Small enough for two CPU cores. Decoupled RoPE halves the steps to a given loss at this size,
    # and the widths are ones that Metal's attention kernels fuse: 64 + 32 for queries and keys, 64
    # for values.
    "nano": {
        "tokenizer": "bytes",
        "steps": 600,
        "batch_size": 4,
        "learning_rate": 4e-3,
        "warmup_steps": 50,
        "initializer_range": 0.08,
        "model": {
            "n_layer": 3,
            "n_head": 2,
            "n_embd": 128,
            "n_positions": 256,
            "qk_rope_head_dim": 32,
        },
    },
    "mla-124m": _with_model(_MLA_124M, kv_lora_rank=384),
    "mla-124m-r256": _with_model(_MLA_124M, kv_lora_rank=256),
    "mla-124m-r128": _with_model(_MLA_124M, kv_lora_rank=128),
    # Widths that Metal's fused decode kernel takes, and an eighth of multi-head attention's cache.
    "mla-124m-rope": _with_model(
        _MLA_124M, position_embedding_type="rope", kv_lora_rank=128, qk_rope_head_dim=64
    ),
    "gpt2-124m": _with_model(_MLA_124M, attention="mha"),
    "gpt2-124m-rope": _with_model(_MLA_124M, attention="mha", position_embedding_type="rope"),
}
"""Named starting points: `nano` for seconds on a Mac, the original's 124M shape at three latent
widths (384 is the original's), GPT-2 itself, and of both kinds one with rotated positions."""


def overlay(config: TrainConfig, values: Mapping[str, Any], where: str) -> TrainConfig:
    """Replace fields of `config` by `values`, as a TOML file or a preset gives them.

    Args:
        config: What to start from.
        values: Field names to values; `model` holds a mapping of the model's own.
        where: Name of the source, for messages.

    Raises:
        UserError: For an unknown key (with the nearest known one) or a value of the wrong type.
    """
    values = dict(values)
    model_values = values.pop("model", {})
    if not isinstance(model_values, Mapping):
        raise UserError(f"{where}: 'model' must be a table, [model]")
    model = dataclasses.replace(
        config.model, **_checked(ModelConfig, model_values, f"{where} [model]")
    )
    return dataclasses.replace(config, model=model, **_checked(TrainConfig, values, where))


def _checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "model"}
    for name, value in values.items():
        if name not in fields:
            home = (
                "model" if cls is TrainConfig and name in ModelConfig.__dataclass_fields__ else None
            )
            advice = f"it belongs under [{home}]" if home else nearest(name, fields)
            raise UserError(f"{where}: unknown key {name!r}; {advice}")
        expected = (
            str(fields[name].type) if isinstance(fields[name].type, str) else fields[name].type
        )
        if not _is_instance(value, expected):
            raise UserError(f"{where}: {name} = {value!r} is not {_describe(expected)}")
    return {k: float(v) if fields[k].type is float else v for k, v in values.items()}


def _is_instance(value: Any, expected: Any) -> bool:
    if get_origin(expected) is Literal:
        return value in get_args(expected)
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


def preset(name: str) -> TrainConfig:
    """The training configuration of a preset; UserError with the nearest name for an unknown
    one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return overlay(TrainConfig(preset=name), PRESETS[name], f"preset {name}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; UserError with the place of the fault where it cannot be read."""
    try:
        return parse_toml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not valid TOML: {e}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The values in TOML text; UserError with the place of the fault."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{where}: not valid TOML: {e}") from None


def to_toml(config: TrainConfig) -> str:
    """All settings as TOML; settings that are None are left out, as TOML has no such value."""

    def without_none(d: dict[str, Any]) -> dict[str, Any]:
        return {
            k: without_none(v) if isinstance(v, dict) else v for k, v in d.items() if v is not None
        }

    return tomli_w.dumps(without_none(dataclasses.asdict(config)))
