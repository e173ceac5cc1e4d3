"""GPT-2 with Multi-head Latent Attention (MLA), for MLX and mlx-lm.

This file is self-contained: a copy travels in every model folder (`"model_file"` in config.json),
so stock mlx-lm loads, generates, serves, quantizes and fine-tunes the model with
`--trust-remote-code`.

MLA (DeepSeek-V2, arXiv:2405.04434, section 2.1) caches one narrow latent per token instead of keys
and values per head:

    c = x W_down                      (kv_lora_rank wide; the only thing that is cached)
    [k_h | v_h] = c W_up,h            (every head h expands the same latent)

Training and prefill expand the keys and values. Decoding absorbs W_up into the query and the
output, so that the cached latents are read as they are:

    scores_h = (q_h W_uk,h) . c       output_h = (softmax(scores_h) c) W_uv,h

A few queries over many cached latents (the next part of a prompt, the check of a draft) do the
same if that is cheaper than expanding the latents.

The last `num_kv_shared_layers` (Gemma 3n's name) have no W_down and cache nothing. Each has its own
W_up, which expands the latents of the last layer before them.

With `attention_k_eq_v` (Gemma 4's name) there is no W_up. The latent is every head's value, and
every head's key apart from the RoPE part, as in Grouped-Tied Attention with one group
(arXiv:2505.21487).

Shape legend, used as suffixes of array names:
    B batch   L query length   T key length (cached + new)   D n_embd   H n_head
    N query/key head width   V value head width   P RoPE head width   R kv_lora_rank
    G num_key_value_heads (of multi-head attention)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    BaseModelArgs,
    create_attention_mask,
    create_causal_mask,
    scaled_dot_product_attention,
)
from mlx_lm.models.cache import KVCache

# (key, value) widths for which Metal's fused decode kernel supports many query heads on one shared
# key head (MLX 0.32). With other widths, the heads are passed as rows of one matrix, so that
# unfused attention reads the latents once instead of once per head.
FUSED_SHARED_HEAD = {(64, 64), (96, 64), (96, 96), (128, 128), (192, 128), (256, 256)}

# Up to this many queries, Metal's fused attention has no gradient and raises an error (MLX 0.32).
NO_FUSED_GRADIENT = 8

# For more queries, its kernels support keys and values of one of these widths, or this pair of
# widths (MLX 0.32).
FUSED_WIDTHS, FUSED_PAIR = {64, 72, 80, 96, 128, 192, 256}, (96, 64)

# The cost of writing a value that the next product reads, in multiply-adds. It was fitted on a CPU
# (docs/decoding.md). The ratio of arithmetic to memory bandwidth in the data sheets of GPUs is of
# the same order.
WRITTEN_VALUE = 100


CHOICES = {
    "attention": ("mla", "mha"),
    "position_embedding_type": ("learned", "rope"),
    "norm": ("layer_norm", "rms_norm"),
    "activation_function": ("gelu_new", "gelu", "swiglu"),
}


def on_metal() -> bool:
    """True if MLX now computes on Metal rather than on a CPU. Everything that is only for Metal
    depends on this."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


@dataclass
class ModelArgs(BaseModelArgs):
    """Shape of the model; the keys of config.json. See `mlx_mla.model.config.ModelConfig` for each
    field."""

    model_type: str = "mla_gpt2"
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: Optional[int] = None
    attention: str = "mla"
    position_embedding_type: Optional[str] = None
    head_dim: Optional[int] = None
    num_key_value_heads: Optional[int] = None
    kv_lora_rank: Optional[int] = None
    kv_lora_ranks: Optional[list[int]] = None
    num_kv_shared_layers: int = 0
    q_lora_rank: Optional[int] = None
    qk_rope_head_dim: int = 0
    v_head_dim: Optional[int] = None
    attention_k_eq_v: bool = False
    latent_norm: bool = False
    attention_bias: Optional[bool] = None
    attention_out_bias: Optional[bool] = None
    mlp_bias: Optional[bool] = None
    norm: str = "layer_norm"
    rope_theta: float = 10000.0
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    eos_token_id: Any = None  # an id, or several in a list
    tokenizer_size: Optional[int] = None  # rows past it pad the vocabulary

    def __post_init__(self) -> None:
        if self.position_embedding_type is None:
            self.position_embedding_type = "rope" if self.qk_rope_head_dim else "learned"
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        self.num_key_value_heads = self.num_key_value_heads or self.n_head
        if self.n_head % self.num_key_value_heads:
            raise ValueError(
                f"n_head {self.n_head} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        rope = self.position_embedding_type == "rope"
        if self.attention == "mla" and rope != bool(self.qk_rope_head_dim):
            raise ValueError(
                f"position_embedding_type {self.position_embedding_type!r} does not go with "
                f"qk_rope_head_dim {self.qk_rope_head_dim}"
            )
        latent_layers = self.n_layer - self.num_kv_shared_layers
        if not 0 < latent_layers <= self.n_layer:
            raise ValueError(
                f"num_kv_shared_layers must be from 0 to {self.n_layer - 1}, not "
                f"{self.num_kv_shared_layers}"
            )
        if self.attention == "mla" and self.kv_lora_ranks is None:
            self.kv_lora_ranks = [self.kv_lora_rank or self.n_embd // 2] * latent_layers
        of_gpt2 = self.norm == "layer_norm"
        if self.attention_bias is None:
            self.attention_bias = of_gpt2 and self.attention == "mha"
        if self.attention_out_bias is None:
            self.attention_out_bias = of_gpt2
        if self.mlp_bias is None:
            self.mlp_bias = of_gpt2
        if self.n_inner is None:
            gated = self.activation_function == "swiglu"
            self.n_inner = -(-8 * self.n_embd // 192) * 64 if gated else 4 * self.n_embd
        self.v_head_dim = self.v_head_dim or self.head_dim
        widths = {self.head_dim, self.v_head_dim, *(self.kv_lora_ranks or [])}
        if self.attention_k_eq_v and len(widths) > 1:
            raise ValueError(
                "attention_k_eq_v needs equal head_dim, v_head_dim and kv_lora_rank, not "
                f"{', '.join(map(str, sorted(widths)))}"
            )


class MultiHeadAttention(nn.Module):
    """GPT-2's attention: keys and values of every head are computed once and cached.

    With fewer heads of keys and values than of queries it is grouped-query attention
    (arXiv:2305.13245), with one multi-query attention (arXiv:1911.02150).
    """

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        assert args.head_dim and args.num_key_value_heads  # ModelArgs fills them in
        self.cache_index = layer
        self.head_dim = args.head_dim
        self.scale = args.head_dim**-0.5
        self.rope_theta = args.rope_theta if args.position_embedding_type == "rope" else None
        self.q_width = args.n_head * args.head_dim
        self.kv_width = args.num_key_value_heads * args.head_dim
        # One matmul reads x: [q | k | v].
        self.c_attn = nn.Linear(
            args.n_embd, self.q_width + 2 * self.kv_width, bias=args.attention_bias
        )
        self.c_proj = nn.Linear(self.q_width, args.n_embd, bias=args.attention_out_bias)

    def __call__(
        self,
        x_BLD: mx.array,
        mask: Any = None,
        cache: Any = None,
        offset: Any = 0,
        latent: Optional[mx.array] = None,
    ) -> tuple[mx.array, Optional[mx.array]]:
        B, L, _ = x_BLD.shape
        q_BHLN, k_BGLN, v_BGLN = (
            a.reshape(B, L, -1, self.head_dim).transpose(0, 2, 1, 3)
            for a in mx.split(
                self.c_attn(x_BLD), [self.q_width, self.q_width + self.kv_width], axis=-1
            )
        )
        if self.rope_theta is not None:
            q_BHLN = rotate(q_BHLN, self.rope_theta, offset)
            k_BGLN = rotate(k_BGLN, self.rope_theta, offset)
        if cache is not None:
            k_BGLN, v_BGLN = cache.update_and_fetch(k_BGLN, v_BGLN)
        out_BHLV = scaled_dot_product_attention(
            q_BHLN, k_BGLN, v_BGLN, cache=cache, scale=self.scale, mask=mask
        )
        return self.c_proj(out_BHLV.transpose(0, 2, 1, 3).reshape(B, L, -1)), latent


class LatentAttention(nn.Module):
    """Multi-head Latent Attention over a stock mlx-lm cache.

    The cache holds the latent, followed by the shared RoPE key if there is one, as keys of shape
    (B, 1, T, R + P). Its values have width 0. Every cache and tool of mlx-lm works with that.

    Attributes:
        layer: This layer's number.
        latent_layer: Number of the layer whose latents it reads: its own number, or that of the
            last layer before those that share.
    """

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        assert args.kv_lora_ranks and args.head_dim and args.v_head_dim  # ModelArgs fills them in
        self.n_head = args.n_head
        self.qk_nope_head_dim = args.head_dim
        self.qk_rope_head_dim = args.qk_rope_head_dim
        self.v_head_dim = args.v_head_dim
        self.layer = layer
        self.latent_layer = min(layer, args.n_layer - args.num_kv_shared_layers - 1)
        self.kv_lora_rank = args.kv_lora_ranks[self.latent_layer]
        self.rope_theta = args.rope_theta
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.scale = qk_head_dim**-0.5
        self.materialize_cache = False

        q_width = args.n_head * qk_head_dim
        self.q_width = args.q_lora_rank or q_width
        has_latent = self.layer == self.latent_layer
        latent_width = self.kv_lora_rank + self.qk_rope_head_dim if has_latent else 0
        # One matmul reads x: [q (or its latent) | kv latent | shared RoPE key].
        self.c_attn = nn.Linear(args.n_embd, self.q_width + latent_width, bias=args.attention_bias)
        if args.q_lora_rank:
            self.q_b_proj = nn.Linear(args.q_lora_rank, q_width, bias=False)
            if args.latent_norm:
                self.q_a_layernorm = nn.RMSNorm(args.q_lora_rank, eps=args.layer_norm_epsilon)
        if args.latent_norm and has_latent:
            self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, eps=args.layer_norm_epsilon)
        # Rows of W_up: for each head its N key rows, then its V value rows (as DeepSeek's
        # kv_b_proj).
        if not args.attention_k_eq_v:
            up_width = args.n_head * (self.qk_nope_head_dim + self.v_head_dim)
            self.kv_b_proj = nn.Linear(self.kv_lora_rank, up_width, bias=False)
        self.c_proj = nn.Linear(
            args.n_head * self.v_head_dim, args.n_embd, bias=args.attention_out_bias
        )

    @property
    def cache_index(self) -> int:
        """Index of this layer's cache among the model's caches."""
        return self.layer if self.materialize_cache else self.latent_layer

    def __call__(
        self,
        x_BLD: mx.array,
        mask: Any = None,
        cache: Any = None,
        offset: Any = 0,
        latent: Any = None,
    ) -> tuple[mx.array, Any]:
        """Attend from x.

        Args:
            offset: Position of the first token, an int or one for each row.
            latent: The latents that the previous layer returned. Only a layer without its own
                latents reads them.

        Returns:
            The output (B, L, D), and latents (B, 1, T, R + P): all that are in a cache of latents,
            as it returned them (quantized or not); without such a cache, those of x.
        """
        B, L, _ = x_BLD.shape
        q, latent_BLW = mx.split(self.c_attn(x_BLD), [self.q_width], axis=-1)
        if "q_b_proj" in self:
            q = self.q_b_proj(self.q_a_layernorm(q) if "q_a_layernorm" in self else q)
        q_BHLN = q.reshape(B, L, self.n_head, -1).transpose(0, 2, 1, 3)
        if self.qk_rope_head_dim:
            q_BHLN, q_rope = mx.split(q_BHLN, [self.qk_nope_head_dim], axis=-1)
            q_rope = rotate(q_rope, self.rope_theta, offset)
            q_BHLN = mx.concatenate([q_BHLN, q_rope], axis=-1)
        if self.layer == self.latent_layer:
            latent = self._latent(latent_BLW, offset)

        if self.materialize_cache:
            k, v = self._expand(latent)
            if cache is not None:
                k, v = cache.update_and_fetch(k, v)
            out = scaled_dot_product_attention(
                q_BHLN, k, v, cache=cache, scale=self.scale, mask=mask
            )
        else:
            if cache is not None and self.layer == self.latent_layer:
                latent, _ = cache.update_and_fetch(latent, mx.zeros((B, 1, L, 0), latent.dtype))
            w_up = None
            if cache is not None and self._absorbing_is_cheaper(L, _length(latent)):
                w_up = self._absorbable_weights()
            if w_up is not None:
                out = self._attend_absorbed(q_BHLN, latent, cache, mask, *w_up)
            else:
                whole = latent
                if hasattr(cache, "bits"):
                    w, scales, biases = latent
                    whole = mx.dequantize(
                        w, scales, biases, group_size=cache.group_size, bits=cache.bits
                    )
                k, v = self._expand(whole)
                out = mx.fast.scaled_dot_product_attention(
                    *fusible(q_BHLN, k, v), scale=self.scale, mask=mask
                )[..., : self.v_head_dim]
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1)), latent

    def _latent(self, latent_BLW: mx.array, offset: Any) -> mx.array:
        """Latents and RoPE keys (B, 1, L, R + P), from their part of c_attn's output."""
        c_BLR, k_rope_BLP = mx.split(latent_BLW, [self.kv_lora_rank], axis=-1)
        if "kv_a_layernorm" in self:
            c_BLR = self.kv_a_layernorm(c_BLR)
        if not self.qk_rope_head_dim:
            return c_BLR[:, None]
        k_rope = rotate(k_rope_BLP[:, None], self.rope_theta, offset)
        return mx.concatenate([c_BLR[:, None], k_rope], axis=-1)

    def _expand(self, latent: mx.array) -> tuple[mx.array, mx.array]:
        """Keys (B, H, T, N + P) and values (B, H, T, V) of latents (B, 1, T, R + P). Without W_up,
        there is one head of both, shared by all queries."""
        B, _, T, _ = latent.shape
        c, k_rope = mx.split(latent, [self.kv_lora_rank], axis=-1)
        if "kv_b_proj" not in self:
            return latent, c
        kv = self.kv_b_proj(c).reshape(B, T, self.n_head, -1).transpose(0, 2, 1, 3)
        k, v = mx.split(kv, [self.qk_nope_head_dim], axis=-1)
        if self.qk_rope_head_dim:
            k_rope = mx.broadcast_to(k_rope, (B, self.n_head, T, self.qk_rope_head_dim))
            k = mx.concatenate([k, k_rope], axis=-1)
        return k, v

    def _absorbing_is_cheaper(self, L: int, T: int) -> bool:
        """True if L queries cost less on T latents than on the keys and values they expand to.

        The cost of a head is its multiply-adds, and the values written between two products. The
        softmax costs the same in both cases. On a GPU, attention over expanded keys is fused and
        writes no scores.
        """
        N, P = self.qk_nope_head_dim, self.qk_rope_head_dim
        V, R = self.v_head_dim, self.kv_lora_rank
        if "kv_b_proj" not in self:
            return L == 1
        expanded = T * (N + V) * (R + WRITTEN_VALUE) + L * T * (N + P + V)
        absorbed = L * R * (N + V + 2 * WRITTEN_VALUE) + L * T * 2 * (R + P)
        if mx.default_device() != mx.cpu:
            absorbed += L * T * WRITTEN_VALUE
        return L == 1 or absorbed <= expanded

    def _absorbable_weights(self) -> Optional[tuple[Any, Any]]:
        """Functions that apply W_uk and W_uv^T of each head to rows (H, rows, N or R).

        None if kv_b_proj is wrapped (LoRA): it then has no single weight to absorb.
        """
        if "kv_b_proj" not in self:
            return _as_it_is, _as_it_is
        proj, H = self.kv_b_proj, self.n_head
        if type(proj) is nn.Linear:
            w_HOR = proj.weight.reshape(H, -1, self.kv_lora_rank)
            w_uk, w_uv = w_HOR[:, : self.qk_nope_head_dim], w_HOR[:, self.qk_nope_head_dim :]
            return (lambda q: q @ w_uk), (lambda o: o @ w_uv.swapaxes(-1, -2))
        if type(proj) is nn.QuantizedLinear:
            parts: list[Any] = [proj.weight, proj.scales, proj.get("biases")]
            parts = [None if p is None else p.reshape(H, -1, p.shape[-1]) for p in parts]
            uk = [None if p is None else p[:, : self.qk_nope_head_dim] for p in parts]
            uv = [None if p is None else p[:, self.qk_nope_head_dim :] for p in parts]
            matmul: Any = partial(
                mx.quantized_matmul, group_size=proj.group_size, bits=proj.bits, mode=proj.mode
            )
            return (lambda q: matmul(q, *uk, transpose=False)), (
                lambda o: matmul(o, *uv, transpose=True)
            )
        return None

    def _attend_absorbed(
        self,
        q: mx.array,
        latent: Any,
        cache: Any,
        mask: Any,
        to_latent: Callable,
        from_latent: Callable,
    ) -> mx.array:
        """Queries (B, H, L, N + P) against the cached latents (B, 1, T, R + P); returns (B, H, L,
        V)."""
        B, H, L, _ = q.shape
        T, R = _length(latent), self.kv_lora_rank
        # All rows of a batch go through a head's weights together, so the weights are read once.
        q_BHLR = _by_head(to_latent, q[..., : self.qk_nope_head_dim])
        if self.qk_rope_head_dim:
            q_BHLR = mx.concatenate([q_BHLR, q[..., self.qk_nope_head_dim :]], axis=-1)
        if (
            not hasattr(cache, "bits")
            and (latent.shape[-1], R) in FUSED_SHARED_HEAD
            and H * L <= 32
            and L <= 8
            and on_metal()
        ):
            out = scaled_dot_product_attention(
                q_BHLR, latent, latent[..., :R], cache, self.scale, mask
            )
        else:
            # Values as wide as the keys: dropping the RoPE part of the result is cheaper than
            # copying the cache.
            rows = q_BHLR.reshape(B, 1, H * L, -1)
            mask = _repeat_mask(mask, H, L, T)
            if hasattr(cache, "bits"):
                # Scores of float32 queries are float32, whatever the type of the scales.
                out = scaled_dot_product_attention(
                    rows.astype(mx.float32), latent, latent, cache, self.scale, mask
                ).astype(q.dtype)
            elif q.dtype == mx.float32:
                out = mx.fast.scaled_dot_product_attention(
                    rows, latent, latent, scale=self.scale, mask=mask
                )
            else:
                out = attend_in_half(rows, latent, self.scale, mask)
        return _by_head(from_latent, out[..., :R].reshape(B, H, L, R))


def fusible(q: mx.array, k: mx.array, v: mx.array) -> tuple[mx.array, ...]:
    """Pad queries and keys (B, heads, L or T, K) and values (B, heads, T, V) to one width on Metal,
    if its kernels only support that. The zeros change neither scores nor values."""
    widths = k.shape[-1], v.shape[-1]
    widest = max(widths)
    taken = widths == FUSED_PAIR or widths == (widest, widest)
    few = q.shape[2] <= NO_FUSED_GRADIENT
    if taken or few or widest not in FUSED_WIDTHS or not on_metal():
        return q, k, v
    return tuple(mx.pad(x, [(0, 0)] * 3 + [(0, widest - x.shape[-1])]) for x in (q, k, v))


def attend_in_half(
    q_B1SW: mx.array, latent_B1TW: mx.array, scale: float, mask: Optional[mx.array]
) -> mx.array:
    """Attention (B, 1, S, W) of bfloat16 or float16 queries on latents, as both keys and values.

    A product is rounded to its inputs' type: in bfloat16, a score of 37 is off by up to 0.125,
    where a fused kernel would keep float32. Therefore the largest score of each row is computed
    first, and a second product subtracts it before rounding. The scores that matter to the softmax
    are then near 0, where rounding is fine. Reading float32 copies of the latents would move twice
    the bytes.

    Args:
        mask: True where a query sees a latent; broadcasts to (B, 1, S, T). None: everywhere.
    """
    k = latent_B1TW.swapaxes(-1, -2)

    def visible(scores: mx.array) -> mx.array:
        return scores if mask is None else mx.where(mask, scores, mx.finfo(scores.dtype).min)

    largest = visible(scale * (q_B1SW @ k)).max(axis=-1, keepdims=True)
    scores = visible(mx.addmm(-largest, q_B1SW, k, alpha=scale))
    return mx.softmax(scores, axis=-1, precise=True) @ latent_B1TW


def rotate(x: mx.array, theta: float, offset: Any) -> mx.array:
    """Rotate the pairs (2i, 2i + 1) of the last axis by the position (RoFormer, arXiv:2104.09864).

    Args:
        x: (B, heads, L, width).
        theta: Base of the wavelengths.
        offset: Position of the first token, an int or one for each row of the batch.
    """
    return mx.fast.rope(x, x.shape[-1], traditional=True, base=theta, scale=1.0, offset=offset)


def _as_it_is(x: mx.array) -> mx.array:
    return x


def _by_head(apply: Callable, x_BHLN: mx.array) -> mx.array:
    """Apply a function of (H, rows, N) to the rows of all sequences, head by head."""
    B, H, L, _ = x_BHLN.shape
    out = apply(x_BHLN.swapaxes(0, 1).reshape(H, B * L, -1))
    return out.reshape(H, B, L, -1).swapaxes(0, 1)


def _length(cached: Any) -> int:
    """Number of tokens in what a cache returned, quantized or not."""
    return (cached if isinstance(cached, mx.array) else cached[0]).shape[2]


def differentiable_mask(mask: Any, L: int) -> Any:
    """A causal mask of L tokens, without a cache, for which attention has a gradient.

    On Metal, few queries have a gradient only if the mask is an array, which unfused attention
    handles.
    """
    return create_causal_mask(L) if L <= NO_FUSED_GRADIENT and on_metal() else mask


def _repeat_mask(mask: Any, H: int, L: int, T: int) -> Any:
    """The mask of L queries over T keys, repeated for H heads: H x L rows, head by head."""
    if L == 1 or mask is None:
        return mask
    if isinstance(mask, str):  # "causal"
        mask = create_causal_mask(L, T - L)
    mask = mask.reshape(-1, 1, L, T)
    return mx.broadcast_to(mask, (mask.shape[0], H, L, T)).reshape(mask.shape[0], 1, H * L, T)


def gelu_new(x: mx.array) -> mx.array:
    """GPT-2's GELU, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), by 1 + tanh(z) = 2
    sigmoid(2z).

    On CPUs it is a third faster than the tanh form, since transcendental functions dominate.
    """
    return x * mx.sigmoid(1.5957691216057308 * (x + 0.044715 * (x * x * x)))


def swiglu(x: mx.array) -> mx.array:
    """Llama's gated SiLU of [gate | up], half as wide (arXiv:2002.05202)."""
    gate, up = mx.split(x, 2, axis=-1)
    return nn.silu(gate) * up


ACTIVATIONS = {"gelu_new": gelu_new, "gelu": nn.gelu, "swiglu": swiglu}


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        assert args.n_inner  # ModelArgs fills it in
        # One matmul reads x; for "swiglu" it gives [gate | up].
        width = 2 * args.n_inner if args.activation_function == "swiglu" else args.n_inner
        self.c_fc = nn.Linear(args.n_embd, width, bias=args.mlp_bias)
        self.c_proj = nn.Linear(args.n_inner, args.n_embd, bias=args.mlp_bias)
        self._act = ACTIVATIONS[args.activation_function]

    def __call__(self, x: mx.array) -> mx.array:
        return self.c_proj(self._act(self.c_fc(x)))


def norm(args: ModelArgs) -> nn.Module:
    """A norm of the residual stream."""
    norm_class = nn.LayerNorm if args.norm == "layer_norm" else nn.RMSNorm
    return norm_class(args.n_embd, eps=args.layer_norm_epsilon)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.ln_1 = norm(args)
        self.attn = (LatentAttention if args.attention == "mla" else MultiHeadAttention)(
            args, layer
        )
        self.ln_2 = norm(args)
        self.mlp = MLP(args)
        self.drop = nn.Dropout(args.dropout)

    def __call__(
        self,
        x: mx.array,
        mask: Any = None,
        cache: Any = None,
        offset: Any = 0,
        latent: Any = None,
    ) -> tuple[mx.array, Any]:
        """Return the new x, and the latents for a following block without its own."""
        attended, latent = self.attn(self.ln_1(x), mask, cache, offset, latent)
        x = x + self.drop(attended)
        return x + self.drop(self.mlp(self.ln_2(x))), latent


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.n_positions = args.n_positions
        self.wte = nn.Embedding(args.vocab_size, args.n_embd)
        if args.position_embedding_type == "learned":  # RoPE lives in the attention
            self.wpe = nn.Embedding(args.n_positions, args.n_embd)
        self.drop = nn.Dropout(args.dropout)
        self.h = [Block(args, i) for i in range(args.n_layer)]
        self.ln_f = norm(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        L = inputs.shape[1]
        cache = cache or [None] * len(self.h)
        offset = 0 if cache[0] is None else cache[0].offset
        if isinstance(offset, int):
            check_positions(offset + L, self.n_positions)

        h = self.wte(inputs)
        if "wpe" in self:
            positions = mx.arange(L) + (offset if isinstance(offset, int) else offset[..., None])
            if not isinstance(offset, int):
                # Positions outside the table belong to padding, which is masked, and to rows that
                # have become too long, which `Model` ends.
                positions = mx.clip(positions, 0, self.n_positions - 1)
            h = h + self.wpe(positions)
        h = self.drop(h)
        mask = create_attention_mask(h, cache[0])
        if cache[0] is None:
            mask = differentiable_mask(mask, L)
        latent = None
        for block in self.h:
            h, latent = block(h, mask, cache[block.attn.cache_index], offset, latent)
        return self.ln_f(h)


def check_positions(end: int, n_positions: int) -> None:
    """Raise a ValueError for tokens past the position table. MLX would read garbage there."""
    if end > n_positions:
        raise ValueError(
            f"{end} tokens of context do not fit this model's n_positions={n_positions}; shorten "
            "the prompt or generate fewer tokens"
        )


def past_positions(cache: Any, length: int, n_positions: int) -> Optional[mx.array]:
    """Which of the next tokens of a batch are past the position table, bool (B, L); None if no row
    can be that long.

    Args:
        cache: A layer's mlx-lm cache before the tokens, or None.
        length: Number of new tokens.
    """
    if cache is None or isinstance(cache.offset, int) or cache.size() + length <= n_positions:
        return None
    return cache.offset[:, None] + mx.arange(length) >= n_positions


class Model(nn.Module):
    """The language model, by mlx-lm's contract: token ids (B, L) to logits (B, L, vocab_size).

    The cache holds latents. To hold expanded keys and values, as multi-head attention does, call
    `materialize_cache(True)` before making a cache. The logits are the same.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.transformer = Transformer(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)
        if args.num_kv_shared_layers:
            # A model without this method has one cache per layer, which may also be a rotating one.
            self.make_cache = self._make_cache

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        past = past_positions(cache[0] if cache else None, inputs.shape[1], self.args.n_positions)
        logits = self.head(self.transformer(inputs, cache))
        if self.args.tokenizer_size is not None and not self.training:
            # Rows that pad the vocabulary are never sampled, but a training loss may use them.
            padding = mx.arange(logits.shape[-1]) >= self.args.tokenizer_size
            logits = mx.where(padding, mx.finfo(logits.dtype).min, logits)
        return logits if past is None else self._end_of_text(past, logits)

    def head(self, h: mx.array) -> mx.array:
        """Logits (..., vocab_size) of hidden states (..., D)."""
        return self.lm_head(h) if "lm_head" in self else self.transformer.wte.as_linear(h)

    def _end_of_text(self, past: mx.array, logits: mx.array) -> mx.array:
        """Make the end of text the only likely token where rows are too long (`past`, (B, L)).

        An exception would end the whole batch, and with it mlx-lm's server for all clients.
        """
        ends = self.args.eos_token_id
        end = ends[0] if isinstance(ends, (list, tuple)) else ends
        if end is None:
            return logits
        never = mx.finfo(logits.dtype).min
        only = mx.where(mx.arange(logits.shape[-1]) == end, 0, never).astype(logits.dtype)
        return mx.where(past[..., None], only, logits)

    def materialize_cache(self, on: bool) -> None:
        """Cache expanded keys and values (True) or latents (False). No effect on MHA."""
        for block in self.layers:
            if isinstance(block.attn, LatentAttention):
                block.attn.materialize_cache = on

    def _make_cache(self) -> list[KVCache]:
        """One cache for each layer that caches anything."""
        return [KVCache() for _ in {block.attn.cache_index for block in self.layers}]

    def sanitize(self, weights: dict) -> dict:
        """Drop the output head if a file repeats it although it is tied to the embedding."""
        tied = self.args.tie_word_embeddings
        return {k: w for k, w in weights.items() if k != "lm_head.weight" or not tied}

    @property
    def layers(self) -> list[Block]:
        return self.transformer.h

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Do not quantize the position table: it is small, and rounding it costs most."""
        return lambda path, _: not path.endswith("wpe")
