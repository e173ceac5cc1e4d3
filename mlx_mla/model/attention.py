"""The kinds of attention, and everything that follows from their settings, without a framework.

A kind of attention is a class in this module, with its own fields in `ModelConfig`, and a module in
each of the two model files. Everything else asks `ModelConfig.attention_spec`, an instance of one
of these classes. Widths use the letters of the model files: N for queries and keys, P for their
decoupled RoPE part, V for values, R for the latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from mlx_mla.errors import UserError, flag

if TYPE_CHECKING:
    from mlx_mla.model.config import ModelConfig

AttentionName = Literal["mla", "mha"]

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


class Attention(ABC):
    """The attention of a resolved configuration."""

    fields: ClassVar[tuple[str, ...]]
    """Fields of `ModelConfig` that apply to this kind but not to every kind."""
    biased: ClassVar[bool]
    """True if the projections that read x have a bias by default."""

    def __init__(self, config: ModelConfig):
        self.c = config
        self.head_dim = _head_dim(config)

    @classmethod
    @abstractmethod
    def resolve(cls, c: ModelConfig) -> None:
        """Fill in and check the fields of this kind in a configuration, in place.

        Raises:
            UserError: If a value is impossible; the message names the option.
        """

    @property
    @abstractmethod
    def text(self) -> str:
        """A short description of the attention."""

    @property
    @abstractmethod
    def cache_text(self) -> str:
        """A short description of a layer's decoding cache."""

    @property
    @abstractmethod
    def head_widths(self) -> tuple[int, int]:
        """Width of one head's query and key, and width of its value."""

    @abstractmethod
    def tensors(self, layer: int) -> Tensors:
        """Yield the name (within the layer's attention) and shape of every tensor, in the order of
        the forward pass. Matrices are (out, in)."""

    @abstractmethod
    def cached(self, layer: int, materialized: bool = False) -> list[tuple[int, int]]:
        """Return (heads, width) of each array that decoding caches for a layer.

        Args:
            materialized: True for a cache of keys and values that are expanded from latents.
        """

    @property
    def latent_widths(self) -> list[int]:
        """Values per token that each layer reads when decoding on latents; empty for a kind without
        latents."""
        return []

    @property
    def beyond_gpt2(self) -> list[str]:
        """The flags that GPT-2 cannot express; empty for GPT-2's own attention."""
        return [f"--attention {self.c.attention}"]

    def cached_values(self, materialized: bool = False) -> int:
        """Values that decoding caches for one token of context, over all layers."""
        layers = range(self.c.n_layer)
        return sum(heads * width for i in layers for heads, width in self.cached(i, materialized))

    def score_flops(self, on_latents: bool = False) -> int:
        """FLOPs of one query on one key, over all layers: the score and the weighted value.

        Args:
            on_latents: True for attention with the up-projection absorbed (see model_mlx.py).
        """
        return 2 * self.c.n_layer * self.c.n_head * sum(self.head_widths)

    def kept_values(self) -> float:
        """Values per token that attention stores for the backward pass, averaged over the layers:
        queries, outputs, keys, values and latents."""
        values = self.cached_values(materialized=True)
        if self.latent_widths:
            values += self.cached_values()
        return self.c.n_head * sum(self.head_widths) + values / self.c.n_layer


class MultiHead(Attention):
    """Multi-head attention as in GPT-2, and its variants whose heads share keys and values:
    grouped-query attention (arXiv:2305.13245), and multi-query attention with one such head."""

    fields = ("num_key_value_heads",)
    biased = True

    @classmethod
    def resolve(cls, c: ModelConfig) -> None:
        c.position_embedding_type = c.position_embedding_type or "learned"
        if c.position_embedding_type == "rope" and _head_dim(c) % 2:
            raise UserError(
                f"--position-embedding-type rope rotates pairs, but a head is {_head_dim(c)} wide; "
                f"use --head-dim {_head_dim(c) + 1}, or another --n-head"
            )
        if c.num_key_value_heads is not None and c.n_head % c.num_key_value_heads:
            divisors = [n for n in range(1, c.n_head + 1) if c.n_head % n == 0]
            raise UserError(
                f"--num-key-value-heads {c.num_key_value_heads} does not divide --n-head "
                f"{c.n_head}; use one of {', '.join(map(str, divisors))}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.c.num_key_value_heads or self.c.n_head

    @property
    def text(self) -> str:
        heads = "multi-head attention"
        if self.kv_heads < self.c.n_head:
            heads = f"grouped-query attention, num_key_value_heads {self.kv_heads}"
        if self.kv_heads == 1 < self.c.n_head:
            heads = "multi-query attention"
        return heads + (", RoPE" if self.c.position_embedding_type == "rope" else "")

    @property
    def cache_text(self) -> str:
        return f"keys and values {self.kv_heads * self.head_dim} wide"

    @property
    def head_widths(self) -> tuple[int, int]:
        return self.head_dim, self.head_dim

    def tensors(self, layer: int) -> Tensors:
        c, width = self.c, self.c.n_head * self.head_dim
        rows = width + 2 * self.kv_heads * self.head_dim  # [q | k | v]
        yield from _linear("c_attn", c.n_embd, rows, c.attention_bias)
        yield from _linear("c_proj", width, c.n_embd, c.attention_out_bias)

    def cached(self, layer: int, materialized: bool = False) -> list[tuple[int, int]]:
        return [(self.kv_heads, self.head_dim)] * 2

    @property
    def beyond_gpt2(self) -> list[str]:
        c = self.c
        beyond = c.flags_except(position_embedding_type="learned")
        if self.kv_heads != c.n_head:
            beyond.append(f"--num-key-value-heads {self.kv_heads}")
        if self.head_dim * c.n_head != c.n_embd:
            beyond.append(f"--head-dim {self.head_dim}")
        return beyond


class MultiHeadLatent(Attention):
    """DeepSeek-V2's attention (arXiv:2405.04434): all heads expand one latent (model_mlx.py)."""

    fields = (
        "kv_lora_rank",
        "kv_lora_ranks",
        "num_kv_shared_layers",
        "q_lora_rank",
        "qk_rope_head_dim",
        "v_head_dim",
        "attention_k_eq_v",
        "latent_norm",
    )
    biased = False

    @classmethod
    def resolve(cls, c: ModelConfig) -> None:
        if c.num_kv_shared_layers >= c.n_layer:
            raise UserError(
                f"--num-kv-shared-layers must be from 0 to {c.n_layer - 1} (--n-layer minus 1), "
                f"not {c.num_kv_shared_layers}"
            )
        if c.kv_lora_ranks is not None:
            latents = c.n_layer - c.num_kv_shared_layers
            if len(c.kv_lora_ranks) != latents:
                raise UserError(
                    f"--kv-lora-ranks needs {latents} widths, one for each layer with its own "
                    f"latent, not {' '.join(map(str, c.kv_lora_ranks))}"
                )
            if c.kv_lora_rank not in (None, max(c.kv_lora_ranks)):
                raise UserError(
                    f"--kv-lora-rank {c.kv_lora_rank} is not the largest of --kv-lora-ranks; use "
                    f"{max(c.kv_lora_ranks)}, or leave out one of the two"
                )
            c.kv_lora_rank = max(c.kv_lora_ranks)
        if c.attention_k_eq_v:
            cls._resolve_tied_widths(c)
        if c.kv_lora_rank is None:
            c.kv_lora_rank = max(1, c.n_embd // 2)
        if c.v_head_dim is None:
            c.v_head_dim = _head_dim(c)
        if c.qk_rope_head_dim % 2:
            raise UserError(
                f"--qk-rope-head-dim must be even, not {c.qk_rope_head_dim}; "
                f"use {c.qk_rope_head_dim + 1}"
            )
        rope = c.qk_rope_head_dim > 0
        if c.position_embedding_type is None:
            c.position_embedding_type = "rope" if rope else "learned"
        if c.position_embedding_type == "rope" and not rope:
            raise UserError(
                "--position-embedding-type rope with --attention mla needs the width of the "
                f"rotated part; use --qk-rope-head-dim {max(2, _head_dim(c) // 4 * 2)}"
            )
        if c.position_embedding_type == "learned" and rope:
            raise UserError(
                "--position-embedding-type learned excludes a part with RoPE; use "
                "--qk-rope-head-dim 0"
            )

    @staticmethod
    def _resolve_tied_widths(c: ModelConfig) -> None:
        """Set the head widths to the width of the latent, which is each head's value."""
        if c.kv_lora_ranks is not None:
            raise UserError(
                "--attention-k-eq-v makes heads as wide as the latent, and all layers have the "
                "same head width; use --kv-lora-rank instead of --kv-lora-ranks"
            )
        if c.kv_lora_rank is None:
            c.kv_lora_rank = _head_dim(c)
        for name in ("head_dim", "v_head_dim"):
            if getattr(c, name) not in (None, c.kv_lora_rank):
                raise UserError(
                    f"{flag(name)} {getattr(c, name)}: with --attention-k-eq-v a head is as wide "
                    f"as the latent, --kv-lora-rank {c.kv_lora_rank}; leave it out"
                )
            setattr(c, name, c.kv_lora_rank)

    @property
    def latent_ranks(self) -> list[int]:
        """Width R of the latent that each layer reads."""
        c = self.c
        assert c.kv_lora_rank
        if c.kv_lora_ranks is None:
            return [c.kv_lora_rank] * c.n_layer
        return c.kv_lora_ranks + c.kv_lora_ranks[-1:] * c.num_kv_shared_layers

    def has_latent(self, layer: int) -> bool:
        """True if a layer has its own latent, instead of reading an earlier layer's."""
        return layer < self.c.n_layer - self.c.num_kv_shared_layers

    @property
    def text(self) -> str:
        ranks = ", ".join(map(str, self.c.kv_lora_ranks or self.latent_ranks[:1]))
        rope = f", RoPE {self.c.qk_rope_head_dim} wide" if self.c.qk_rope_head_dim else ""
        shared = self.c.num_kv_shared_layers
        sharing = f", one latent for the last {shared + 1} layers" if shared else ""
        tied = ", the latent itself as keys and values" if self.c.attention_k_eq_v else ""
        return f"Multi-head Latent Attention, kv_lora_rank {ranks}{rope}{tied}{sharing}"

    @property
    def cache_text(self) -> str:
        shared = self.c.num_kv_shared_layers
        sharing = f", one for the last {shared + 1}" if shared else ""
        return f"latents {' or '.join(map(str, sorted(set(self.latent_ranks))))} wide{sharing}"

    @property
    def head_widths(self) -> tuple[int, int]:
        c = self.c
        assert c.v_head_dim
        return self.head_dim + c.qk_rope_head_dim, c.v_head_dim

    def tensors(self, layer: int) -> Tensors:
        c, rank, (key_width, value_width) = self.c, self.latent_ranks[layer], self.head_widths
        q_width = c.n_head * key_width
        # [q (or its latent) | KV latent | shared RoPE key]
        latent_width = rank + c.qk_rope_head_dim if self.has_latent(layer) else 0
        rows = (c.q_lora_rank or q_width) + latent_width
        yield from _linear("c_attn", c.n_embd, rows, c.attention_bias)
        if c.latent_norm and self.has_latent(layer):
            yield "kv_a_layernorm.weight", (rank,)
        if c.q_lora_rank:
            yield from _linear("q_b_proj", c.q_lora_rank, q_width, False)
            if c.latent_norm:
                yield "q_a_layernorm.weight", (c.q_lora_rank,)
        if not c.attention_k_eq_v:
            up_width = c.n_head * (self.head_dim + value_width)
            yield from _linear("kv_b_proj", rank, up_width, False)
        yield from _linear("c_proj", c.n_head * value_width, c.n_embd, c.attention_out_bias)

    def cached(self, layer: int, materialized: bool = False) -> list[tuple[int, int]]:
        if materialized and not self.c.attention_k_eq_v:
            return [(self.c.n_head, width) for width in self.head_widths]
        return [(1, self.latent_widths[layer])] if self.has_latent(layer) else []

    @property
    def latent_widths(self) -> list[int]:
        return [rank + self.c.qk_rope_head_dim for rank in self.latent_ranks]

    def score_flops(self, on_latents: bool = False) -> int:
        if not on_latents:
            return super().score_flops()
        # A score is a product over R + P values; the weighted sum is over latents R wide.
        return 2 * self.c.n_head * sum(2 * r + self.c.qk_rope_head_dim for r in self.latent_ranks)


ATTENTIONS: dict[AttentionName, type[Attention]] = {"mla": MultiHeadLatent, "mha": MultiHead}


def meaningless_fields(attention: AttentionName) -> list[str]:
    """Fields of the other kinds, which do not apply to this one."""
    names = dict.fromkeys(name for own in ATTENTIONS.values() for name in own.fields)
    return [name for name in names if name not in ATTENTIONS[attention].fields]


def _head_dim(c: ModelConfig) -> int:
    return c.head_dim or c.n_embd // c.n_head


def _linear(name: str, width_in: int, width_out: int, bias: bool | None) -> Tensors:
    yield f"{name}.weight", (width_out, width_in)
    if bias:
        yield f"{name}.bias", (width_out,)
