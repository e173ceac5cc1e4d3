"""A model with latent attention in the format of DeepSeek-V3 (`DeepseekV3ForCausalLM`), whose own
code in mlx-lm, transformers and other engines then runs it.

That code normalizes every latent and adds 1e-6 to the mean square, in every norm of a latent. Both
of our differences go into the weights:

- Another epsilon e: RMSNorm_e(x) = RMSNorm_1e-6(a x) with a = sqrt(1e-6 / e), so what writes to a
  norm's input is multiplied by a.
- No norm: where the mean square of c is far below 1e-6, RMSNorm(c) is c / sqrt(1e-6), a linear
  map. The norm before the attention makes x smaller by a power of two, which the gains of the
  latent's norm take back, and the weights of queries and RoPE keys, which no norm follows.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from mlx_mla.checkpoint import in_type
from mlx_mla.errors import UserError
from mlx_mla.model.attention import MultiHeadLatent
from mlx_mla.model.config import InferenceDType, ModelConfig

from .hf import special_ids, write_folder

EPSILON = 1e-6
"""What their code adds to the mean square of a latent, whatever config.json says."""

SMALL = 2.0**-20
"""Largest root mean square of a latent whose norm is to be a linear map: the map is then off by
less than 5e-7 of itself."""

MAX_LAYERS = 61
"""mlx-lm drops the tensors of model.layers.61, which in DeepSeek-V3 predicts further tokens."""

BIASED = (
    "biases of the attention: mlx-lm and transformers read them; check another engine's logits, "
    "since it may ignore them"
)
"""What to say of a model whose attention has biases."""


def check_deepseek(config: ModelConfig, dtype: InferenceDType) -> None:
    """UserError if DeepSeek-V3's format cannot hold a model, with the flags that it has no name
    for."""
    c = config
    beyond = c.flags_except(
        attention="mla",
        norm="rms_norm",
        activation_function="swiglu",
        mlp_bias=False,
        num_kv_shared_layers=0,
    )
    if c.attention == "mla" and not c.qk_rope_head_dim:
        beyond.append("--qk-rope-head-dim 0")
    if c.n_layer > MAX_LAYERS:
        beyond.append(f"--n-layer {c.n_layer} (at most {MAX_LAYERS})")
    if beyond:
        raise UserError(
            "--to deepseek needs latent attention with RoPE, RMSNorm and SwiGLU, and this model "
            f"has {', '.join(beyond)}"
        )
    if dtype == "float16" and _has_linear_norm(c):
        raise UserError(
            "--to deepseek of a model without --latent-norm needs numbers smaller than float16 "
            "has; use --dtype bfloat16"
        )


def is_biased(config: ModelConfig) -> bool:
    """True if the folder's projections of the attention have biases."""
    return bool(config.attention_bias or config.attention_out_bias)


def _query_bias(c: ModelConfig) -> bool:
    """Whether queries have a bias and no latent, which their format has no tensor for."""
    return bool(c.attention_bias) and c.q_lora_rank is None


def _has_linear_norm(c: ModelConfig) -> bool:
    return not c.latent_norm or _query_bias(c)


def write_deepseek(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    dtype: InferenceDType = "float32",
) -> None:
    """Write a plain `DeepseekV3ForCausalLM` folder: dense layers only, the output head a matrix of
    its own, and without the rows that pad the vocabulary.

    Args:
        folder: Exists, and is empty.
        config: Resolved, and one that `check_deepseek` lets pass.
        weights: Tensors in our layout, float32.
        dtype: Type to store them in.
    """
    c, tokens = config, len(tokenizer)
    assert c.n_inner and c.kv_lora_rank
    q_lora_rank = c.n_embd + 1 if _query_bias(c) else c.q_lora_rank
    a = math.sqrt(EPSILON / c.layer_norm_epsilon)
    embedding = weights["transformer.wte.weight"][:tokens]
    state = {
        "model.embed_tokens.weight": a * embedding,
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights.get("lm_head.weight", embedding)[:tokens],
    }
    biased = is_biased(c)
    for i in range(c.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        block = {n.removeprefix(ours): w for n, w in weights.items() if n.startswith(ours)}
        gate, up = np.split(block["mlp.c_fc.weight"], 2)
        state |= {
            f"{theirs}{name}": w
            for name, w in {
                **_attention(c, i, block, q_lora_rank, dtype),
                "self_attn.o_proj.weight": a * block["attn.c_proj.weight"],
                "post_attention_layernorm.weight": block["ln_2.weight"],
                "mlp.gate_proj.weight": gate,
                "mlp.up_proj.weight": up,
                "mlp.down_proj.weight": a * block["mlp.c_proj.weight"],
            }.items()
        }
        if biased:
            bias = block.get("attn.c_proj.bias", np.zeros(c.n_embd, np.float32))
            state[f"{theirs}self_attn.o_proj.bias"] = a * bias
    # The fields of DeepSeek-V3's own file, which every engine and version reads.
    values: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": dtype,
        "vocab_size": tokens,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_head,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_nope_head_dim": c.attention_spec.head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "intermediate_size": c.n_inner,
        "hidden_act": "silu",
        "max_position_embeddings": c.n_positions,
        "rms_norm_eps": EPSILON,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "attention_bias": biased,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        # No layer has experts; engines ask for the fields all the same.
        "first_k_dense_replace": c.n_layer,
        "moe_layer_freq": 1,
        "moe_intermediate_size": c.n_inner,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        **special_ids(tokenizer),
    }
    write_folder(folder, state, values, tokenizer, c.n_positions, dtype)


@dataclasses.dataclass(frozen=True)
class _Latent:
    """A latent of queries, or of keys and values, R wide."""

    down: np.ndarray
    """(R, n_embd)"""
    bias: np.ndarray
    norm: np.ndarray | None
    """Gains of the norm; None if it has none."""
    up: np.ndarray
    """(outputs, R)"""

    def bound(self, gain: np.ndarray) -> float:
        """What the root mean square cannot exceed: the input, divided by the gains of the norm
        before the attention, has at most 1."""
        rows, columns = self.down.shape
        norm = np.linalg.norm(self.down * gain) * math.sqrt(columns) + np.linalg.norm(self.bias)
        return float(norm) / math.sqrt(rows)

    def theirs(
        self, width: int, epsilon: float, small: float, dtype: InferenceDType
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The four, with zeros up to a width.

        Args:
            width: Of the latent in all layers.
            epsilon: Of our norms.
            small: What the input is multiplied by.
        """
        rows = len(self.down)
        if self.norm is None:
            down, bias, exact = self.down, small * self.bias, math.sqrt(EPSILON) / small
            held = in_type({"": np.array(exact, np.float32)}, dtype)[""].astype(np.float32)
            gains, up = np.full(rows, held), self.up * (exact / float(held))
        else:
            # The mean is over the width, zeros included.
            share = rows / width
            a = math.sqrt(EPSILON / (epsilon * share))
            down, bias, up = a / small * self.down, a * self.bias, self.up
            gains = math.sqrt(share) * self.norm
        more = width - rows
        return (
            np.pad(down, ((0, more), (0, 0))),
            np.pad(bias, (0, more)),
            np.pad(gains, (0, more)),
            np.pad(up, ((0, 0), (0, more))),
        )


def _attention(
    c: ModelConfig,
    layer: int,
    block: Mapping[str, np.ndarray],
    q_lora_rank: int | None,
    dtype: InferenceDType,
) -> dict[str, np.ndarray]:
    """Norm and attention of a layer under their names, without the output projection."""
    assert c.kv_lora_rank and isinstance(c.attention_spec, MultiHeadLatent)
    gain, rank = block["ln_1.weight"], c.attention_spec.latent_ranks[layer]
    bias = block.get("attn.c_attn.bias", np.zeros(len(block["attn.c_attn.weight"]), np.float32))
    at = np.cumsum([len(bias) - rank - c.qk_rope_head_dim, rank])
    q, kv, k_rope = np.split(block["attn.c_attn.weight"], at)
    q_bias, kv_bias, k_rope_bias = np.split(bias, at)
    if (kv_up := block.get("attn.kv_b_proj.weight")) is None:  # attention_k_eq_v
        kv_up = np.tile(np.eye(rank, dtype=np.float32), (2 * c.n_head, 1))
    latents = {"kv": _Latent(kv, kv_bias, block.get("attn.kv_a_layernorm.weight"), kv_up)}
    if c.q_lora_rank:
        norm = block.get("attn.q_a_layernorm.weight")
        latents["q"] = _Latent(q, q_bias, norm, block["attn.q_b_proj.weight"])
    elif q_lora_rank:  # x itself and a constant entry, which carries the bias
        one = np.zeros(q_lora_rank, np.float32)
        one[-1] = 1
        latents["q"] = _Latent(
            np.eye(q_lora_rank, c.n_embd, dtype=np.float32),
            one,
            None,
            np.concatenate([q, q_bias[:, None]], axis=1),
        )
    linear = [latent.bound(gain) for latent in latents.values() if latent.norm is None]
    small = 1.0
    if linear:
        small = SMALL * 2.0 ** -math.ceil(math.log2(max(*linear, SMALL)))
    epsilon = c.layer_norm_epsilon
    kv_down, kv_bias, kv_norm, kv_up = latents["kv"].theirs(c.kv_lora_rank, epsilon, small, dtype)
    tensors = {
        "input_layernorm.weight": small * gain,
        "self_attn.kv_a_proj_with_mqa.weight": np.concatenate([kv_down, k_rope / small]),
        "self_attn.kv_a_layernorm.weight": kv_norm,
        "self_attn.kv_b_proj.weight": kv_up,
    }
    if is_biased(c):
        tensors["self_attn.kv_a_proj_with_mqa.bias"] = np.concatenate([kv_bias, k_rope_bias])
    if not q_lora_rank:
        tensors["self_attn.q_proj.weight"] = q / small
        return tensors
    q_down, q_bias, q_norm, q_up = latents["q"].theirs(q_lora_rank, epsilon, small, dtype)
    tensors |= {
        "self_attn.q_a_proj.weight": q_down,
        "self_attn.q_a_layernorm.weight": q_norm,
        "self_attn.q_b_proj.weight": q_up,
    }
    if is_biased(c):
        tensors["self_attn.q_a_proj.bias"] = q_bias
    return tensors
