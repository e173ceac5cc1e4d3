"""Hugging Face's Llama, Mistral and Qwen2 (`LlamaForCausalLM` and so on), in and out.

The three share one architecture: RMSNorm, gated SiLU, RoPE, grouped queries; Qwen2 has biases on
queries, keys and values. Two things differ from our layout. Matrices that read the same input are
separate: q, k and v are stacked into `c_attn`, gate and up into `c_fc`. And RoPE rotates the
entries i and i + head_dim / 2 of a head together, where we rotate 2i and 2i + 1 (as DeepSeek does),
so the rows of q and k change places. Neither changes a value, so the way back is exact.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
from transformers import (
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from mlx_mla.checkpoint import check_tensors
from mlx_mla.errors import UserError, shown
from mlx_mla.fields import typed
from mlx_mla.files import read_json
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.weights import parameter_shapes

from .foreign import (
    HEAD,
    ForeignCheckpoint,
    LazyTensor,
    Tensors,
    resolved,
    stacked,
    without_tied_head,
)
from .hf import ends_of_text, open_weights, special_ids, write_folder

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
}
"""The supported values of model_type."""

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
"""What their classes' names begin with, and what they are called."""

EMBEDDING = "model.embed_tokens.weight"

WHOLE = {
    "transformer.wte.weight": EMBEDDING,
    "transformer.ln_f.weight": "model.norm.weight",
    HEAD: HEAD,
}
OF_BLOCK = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "attn.c_proj.bias": "self_attn.o_proj.bias",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
    "mlp.c_proj.bias": "mlp.down_proj.bias",
}
"""Our names of tensors and theirs, where one is one."""


@dataclasses.dataclass(kw_only=True)
class _Source:
    """The fields of their config.json that say what the model computes."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: Optional[int] = None
    head_dim: Optional[int] = None
    intermediate_size: int
    max_position_embeddings: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False


def is_llama(model_type: Any) -> bool:
    """Whether a config.json's model_type, a value of any type, is one that is read here."""
    return isinstance(model_type, str) and model_type in CONFIGS


def read_llama(folder: Path, name: str) -> ForeignCheckpoint:
    """Read a folder with config.json and safetensors (sharded or not) or pytorch_model.bin.

    Raises:
        UserError: If an option is not supported, or the weights do not fit the configuration.
    """
    where = folder / "config.json"
    values = read_json(where)
    kind = values["model_type"]
    config = _config(kind, values, where)
    path, found = open_weights(folder)
    # LlamaModel saves its tensors without the prefix of LlamaForCausalLM. Old files hold the
    # frequencies of RoPE, too.
    found = {
        n if n.startswith(("model.", "lm_head.")) else f"model.{n}": t
        for n, t in found.items()
        if not n.endswith("rotary_emb.inv_freq")
    }
    if config.tie_word_embeddings:
        found = without_tied_head(path, found, EMBEDDING)
    check_tensors(path, found, _their_shapes(config))
    ends = ends_of_text(folder, values)
    ours = _ours(config, found)
    return ForeignCheckpoint(f"Hugging Face {NAMES[kind]}", name, config, ours, folder, ends)


def _config(kind: str, values: dict[str, Any], where: Path) -> ModelConfig:
    defaults = CONFIGS[kind]().to_dict()
    for of_other_fields in ("num_key_value_heads", "head_dim"):
        defaults.pop(of_other_fields, None)
    c = defaults | values
    _refuse_options(kind, c, values, where)
    known = {f.name for f in dataclasses.fields(_Source)}
    s = _Source(**typed(_Source, {n: v for n, v in c.items() if n in known}, str(where)))
    heads, groups = s.num_attention_heads, s.num_key_value_heads
    if groups is not None and (groups < 1 or heads < 1 or heads % groups):
        raise UserError(
            f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}; "
            "the file is damaged"
        )
    return resolved(
        where,
        attention="mha",
        position_embedding_type="rope",
        norm="rms_norm",
        activation_function="swiglu",
        n_embd=s.hidden_size,
        n_layer=s.num_hidden_layers,
        n_head=heads,
        num_key_value_heads=groups,
        head_dim=s.head_dim,
        n_inner=s.intermediate_size,
        n_positions=s.max_position_embeddings,
        vocab_size=s.vocab_size,
        layer_norm_epsilon=s.rms_norm_eps,
        rope_theta=_rope_theta(c, values, where),
        tie_word_embeddings=s.tie_word_embeddings,
        attention_bias=kind == "qwen2" or (kind == "llama" and s.attention_bias),
        attention_out_bias=kind == "llama" and s.attention_bias,
        mlp_bias=kind == "llama" and s.mlp_bias,
    )


def _refuse_options(
    kind: str, c: Mapping[str, Any], values: Mapping[str, Any], where: Path
) -> None:
    """UserError for what their code computes otherwise than our model."""
    architectures = values.get("architectures") or [f"{NAMES[kind]}ForCausalLM"]
    supported = (f"{NAMES[kind]}ForCausalLM", f"{NAMES[kind]}Model")
    if not isinstance(architectures, list) or not set(map(str, architectures)) & set(supported):
        raise UserError(
            f"{where}: architectures {shown(architectures)} is not supported; supported are "
            f"{' and '.join(supported)}"
        )
    if c.get("hidden_act") not in ("silu", "swish"):
        raise UserError(
            f"{where}: hidden_act {shown(c.get('hidden_act'))} is not supported; supported is silu"
        )
    for option in ("quantization_config", "num_experts", "num_local_experts", "use_qk_norm"):
        if values.get(option):
            raise UserError(f"{where}: {option} is not supported")
    window, positions = c.get("sliding_window"), c.get("max_position_embeddings")
    slides = window is not None and (kind == "mistral" or c.get("use_sliding_window"))
    layers = values.get("layer_types")
    if isinstance(layers, list) and any(layer != "full_attention" for layer in layers):
        slides = True
    reaches = isinstance(window, int) and isinstance(positions, int) and window >= positions
    if slides and not reaches:
        raise UserError(
            f"{where}: sliding_window {shown(window)} is not supported; supported is attention "
            "over the whole context"
        )


def _rope_theta(c: Mapping[str, Any], values: Mapping[str, Any], where: Path) -> float:
    """The base of RoPE, which transformers 5 writes within rope_parameters and earlier versions
    beside rope_scaling."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for name, rope in (("rope_parameters", new), ("rope_scaling", old)):
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{where}: {name} is {shown(rope)}, and should be an object")
        scaling = rope.get("rope_type", rope.get("type", "default"))
        if scaling != "default":
            raise UserError(
                f"{where}: {name} of type {shown(scaling)} is not supported; supported is RoPE "
                "without scaling"
            )
    share = (new or {}).get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if share != 1:
        raise UserError(f"{where}: partial_rotary_factor {shown(share)} is not supported")
    theta = (new or {}).get("rope_theta", values.get("rope_theta"))
    if theta is None:
        theta = (c.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise UserError(f"{where}: rope_theta is {shown(theta)}, and should be a number")
    return float(theta)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of theirs that is one of ours, or some rows of one."""

    name: str
    rows: int
    rotated: bool = False
    """RoPE turns what it computes."""


def _parts(config: ModelConfig, name: str, shape: tuple[int, ...]) -> list[_Part]:
    """What a tensor of ours consists of, from top to bottom."""
    c, width = config, config.attention_spec.head_dim
    assert c.n_inner
    if name in WHOLE:
        return [_Part(WHOLE[name], shape[0])]
    layer, _, own = name.removeprefix("transformer.h.").partition(".")
    block = f"model.layers.{layer}"
    if own in OF_BLOCK:
        return [_Part(f"{block}.{OF_BLOCK[own]}", shape[0])]
    module, _, kind = own.rpartition(".")
    if module == "mlp.c_fc":
        return [_Part(f"{block}.mlp.{n}_proj.{kind}", c.n_inner) for n in ("gate", "up")]
    groups = c.num_key_value_heads or c.n_head
    return [
        _Part(f"{block}.self_attn.{n}_proj.{kind}", heads * width, n != "v")
        for n, heads in (("q", c.n_head), ("k", groups), ("v", groups))
    ]


def _their_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in their file."""
    return {
        part.name: (part.rows, *shape[1:])
        for name, shape in parameter_shapes(config).items()
        for part in _parts(config, name, shape)
    }


def _ours(config: ModelConfig, found: Tensors) -> Tensors:
    """Their tensors under our names and in our layout."""
    width = config.attention_spec.head_dim

    def read(part: _Part) -> LazyTensor:
        own = found[part.name]
        return own.mapped(lambda w: _interleaved(w, width)) if part.rotated else own

    return {
        name: stacked([read(part) for part in _parts(config, name, shape)])
        for name, shape in parameter_shapes(config).items()
    }


def _interleaved(w: np.ndarray, width: int) -> np.ndarray:
    """Rows of heads as RoPE of pairs (2i, 2i + 1) needs them, from those of halves."""
    return w.reshape(-1, 2, width // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _halves(w: np.ndarray, width: int) -> np.ndarray:
    """The inverse of `_interleaved`."""
    return w.reshape(-1, width // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def why_not_llama(config: ModelConfig) -> str | None:
    """Why none of the three computes what a model does, as its flags; None if one does."""
    c = config
    beyond = c.flags_except(
        attention="mha",
        position_embedding_type="rope",
        norm="rms_norm",
        activation_function="swiglu",
    )
    # Biases on queries, keys and values alone are Qwen2's.
    if c.attention_out_bias and not c.attention_bias:
        beyond.append("--attention-out-bias True with --attention-bias False")
    if c.mlp_bias and c.attention_bias and not c.attention_out_bias:
        beyond.append("--mlp-bias True with --attention-out-bias False")
    return " ".join(beyond) or None


def write_llama(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    dtype: InferenceDType = "float32",
) -> None:
    """Write a plain `LlamaForCausalLM` folder, or `Qwen2ForCausalLM` if queries, keys and values
    alone have biases. A Mistral comes back as the Llama that it is but for its name.

    Args:
        folder: Exists, and is empty.
        config: Resolved.
        weights: Tensors in our layout, float32.
        dtype: Type to store them in.

    Raises:
        UserError: If none of the two computes what the model does.
    """
    c = config
    if reason := why_not_llama(c):
        raise UserError(
            f"--to hf has no format for a model with {reason}; transformers loads it as it is"
        )
    assert c.n_inner
    width, state = c.attention_spec.head_dim, {}
    for name, w in weights.items():
        parts = _parts(c, name, w.shape)
        ends = np.cumsum([p.rows for p in parts])
        for part, rows in zip(parts, np.split(w, ends[:-1]), strict=True):
            state[part.name] = _halves(rows, width) if part.rotated else rows

    kind = "qwen2" if c.attention_bias and not c.attention_out_bias else "llama"
    biases = {} if kind == "qwen2" else {"attention_bias": c.attention_bias, "mlp_bias": c.mlp_bias}
    hf = CONFIGS[kind](
        hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.num_key_value_heads or c.n_head,
        head_dim=width,
        intermediate_size=c.n_inner,
        max_position_embeddings=c.n_positions,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings,
        architectures=[f"{NAMES[kind]}ForCausalLM"],
        dtype=dtype,
        **biases,
        **special_ids(tokenizer),
    )
    # Earlier versions of transformers have RoPE's base here, and mlx-lm reads no other.
    values = {**json.loads(hf.to_json_string()), "rope_theta": c.rope_theta}
    write_folder(folder, state, values, tokenizer, c.n_positions, dtype)
