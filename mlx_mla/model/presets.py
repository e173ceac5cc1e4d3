"""Where settings come from: presets, TOML files, and how one overlays another."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import tomli_w

from mlx_mla.errors import UserError, nearest, shown
from mlx_mla.fields import typed
from mlx_mla.model.config import TOKENIZER_IDS, ModelConfig
from mlx_mla.model.train_config import RENAMED, TrainConfig

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


_LLAMA_BLOCKS = {"norm": "rms_norm", "activation_function": "swiglu"}


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
    # MLA with RoPE at an eighth of MHA's cache, in widths that Metal's fused decode kernel takes.
    # No study has a verdict on this size. The learning rate is the original's 6e-4, not tuned:
    # after 200 steps at 4e-4 and 8e-4 this model was 6 and 3 % behind MHA, and its best rate was
    # 1.6e-3 where MHA's was 1.1e-3 (docs/study.md).
    "mla-124m-rope": _with_model(
        _MLA_124M, position_embedding_type="rope", kv_lora_rank=128, qk_rope_head_dim=64
    ),
    # The same without an up-projection, at a sixteenth of MHA's cache, in widths that Metal's
    # kernels take as they are. Never trained at this size, and its learning rate is not tuned. At
    # 3 M parameters leaving out the up-projection costs 8.8 % on GPT-2's tokens; on bytes no cost
    # was found (docs/study.md).
    "mla-124m-tied": _with_model(
        _MLA_124M,
        position_embedding_type="rope",
        kv_lora_rank=64,
        qk_rope_head_dim=32,
        attention_k_eq_v=True,
    ),
    "gpt2-124m": _with_model(_MLA_124M, attention="mha"),
    "gpt2-124m-rope": _with_model(_MLA_124M, attention="mha", position_embedding_type="rope"),
    # Llama's blocks in GPT-2's shape. --num-key-value-heads groups the queries.
    "llama-124m": _with_model(
        _MLA_124M, **_LLAMA_BLOCKS, attention="mha", position_embedding_type="rope"
    ),
    # The attention of mla-124m-rope in them, with the norm of the latent that DeepSeek has.
    "mla-124m-llama": _with_model(
        _MLA_124M,
        **_LLAMA_BLOCKS,
        position_embedding_type="rope",
        kv_lora_rank=128,
        qk_rope_head_dim=64,
        latent_norm=True,
    ),
}
"""Named starting points: `nano` trains within minutes on a CPU; `mla-124m` is the original's model,
with two narrower latents beside it; `gpt2-124m` is GPT-2. Those with `rope` in their name rotate
positions, `mla-124m-tied` has no up-projection, and those with `llama` have Llama's blocks
(RMSNorm, SwiGLU, no biases). All 124M presets have the original's learning rate and initialization
std, which no study tuned."""


def overlay(config: TrainConfig, values: Mapping[str, Any], where: str) -> TrainConfig:
    """Replace fields of `config` by `values`, as a TOML file or a preset gives them.

    Args:
        config: What to start from.
        values: Field names to values; `model` holds a mapping of the model's own.
        where: Name of the source, for messages.

    Raises:
        UserError: For an unknown key (with the nearest known one) or a value of the wrong type.
    """
    values = _current(values, where)
    model_values = values.pop("model", {})
    if not isinstance(model_values, Mapping):
        raise UserError(f"{where}: 'model' must be a table, [model]")
    model = dataclasses.replace(
        config.model, **_checked(ModelConfig, model_values, f"{where} [model]")
    )
    return dataclasses.replace(config, model=model, **_checked(TrainConfig, values, where))


def _current(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values under the present names of their settings."""
    for old, new in RENAMED.items():
        if old in values and new in values:
            raise UserError(f"{where}: {old} is the former name of {new}; leave it out")
    return {RENAMED.get(name, name): value for name, value in values.items()}


def _checked(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(cls) if f.name != "model"]
    for name in values:
        if name not in fields:
            of_model = cls is TrainConfig and name in ModelConfig.__dataclass_fields__
            advice = "it belongs under [model]" if of_model else nearest(name, fields)
            raise UserError(f"{where}: unknown key {shown(name)}; {advice}")
    return typed(cls, values, where)


def preset(name: str) -> TrainConfig:
    """The training configuration of a preset; UserError with the nearest name for an unknown
    one."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {shown(name)}; {nearest(name, PRESETS)}")
    return overlay(TrainConfig(preset=name), PRESETS[name], f"preset {name}")


def to_toml(config: TrainConfig) -> str:
    """All settings as TOML; settings that are None are left out, as TOML has no such value."""
    return tomli_w.dumps(config.to_dict())
