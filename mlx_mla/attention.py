"""The kinds of attention, and what follows from their settings. No framework.

A kind is a class here with a field or more in `ModelConfig`, and a module in each of the two model
files; everything else asks `ModelConfig.kind`, which is one of these of a resolved configuration.
Head widths have the letters of the model files: N of queries and keys, P of their decoupled RoPE
part, V of values, R of the latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from mlx_mla.errors import UserError, flag

if TYPE_CHECKING:
    from mlx_mla.config import ModelConfig

AttentionName = Literal["mla", "mha"]

Shape = tuple[int, ...]
Tensors = Iterator[tuple[str, Shape]]


class Attention(ABC):
    """One kind of attention, of one resolved configuration."""

    fields: ClassVar[tuple[str, ...]]
    """Fields of `ModelConfig` that mean something to this kind and not to every kind."""
    biased: ClassVar[bool]
    """Whether the projections that read x have a bias where nothing is said of it."""

    def __init__(self, config: ModelConfig):
        self.c = config

    @classmethod
    @abstractmethod
    def resolve(cls, c: ModelConfig) -> None:
        """Fill in this kind's fields of a configuration, in place, and check them.

        Raises:
            UserError: For an impossible value; the message names the option.
        """

    @property
    @abstractmethod
    def text(self) -> str:
        """The kind in a few words."""

    @property
    @abstractmethod
    def cache_text(self) -> str:
        """What its decoding cache holds of a layer, in a few words."""

    @property
    @abstractmethod
    def head_widths(self) -> tuple[int, int]:
        """Width of a query or key, and of a value, of one head."""

    @abstractmethod
    def tensors(self, layer: int) -> Tensors:
        """Name within the layer's attention and shape of every tensor, in the order of the forward
        pass; matrices are (out, in)."""

    @abstractmethod
    def cached(self, layer: int, materialized: bool = False) -> list[tuple[int, int]]:
        """Heads and width of the arrays that decoding caches for a layer.

        Args:
            materialized: Of expanded keys and values, where the kind has latents to expand.
        """

    @property
    def latent_widths(self) -> list[int]:
        """Values per token that each layer reads where decoding stays with latents; empty for a
        kind that has none."""
        return []

    @property
    def beyond_gpt2(self) -> list[str]:
        """The flags that a GPT-2 has no name for; empty if this is GPT-2's own attention."""
        return [f"--attention {self.c.attention}"]

    def cached_values(self, materialized: bool = False) -> int:
        """Values that decoding caches for one token of context, over all layers."""
        layers = range(self.c.n_layer)
        return sum(heads * width for i in layers for heads, width in self.cached(i, materialized))

    def score_flops(self, on_latents: bool = False) -> int:
        """FLOPs of one query on one key, over all layers: its score, and its share of the output.

        Args:
            on_latents: With the up-projection absorbed (see model_mlx.py).
        """
        return 2 * self.c.n_layer * self.c.n_head * sum(self.head_widths)

    def kept_values(self) -> float:
        """Values per token that a layer keeps for the backward pass: queries, keys, values and
        output."""
        return 2 * self.c.n_head * sum(self.head_widths)


class MultiHead(Attention):
    """GPT-2's own: every head has keys and values."""

    fields = ()
    biased = True

    @classmethod
    def resolve(cls, c: ModelConfig) -> None:
        pass

    @property
    def text(self) -> str:
        return "multi-head attention"

    @property
    def cache_text(self) -> str:
        return f"keys and values {self.c.n_embd} wide"

    @property
    def head_widths(self) -> tuple[int, int]:
        return (self.c.n_embd // self.c.n_head,) * 2

    def tensors(self, layer: int) -> Tensors:
        c = self.c
        yield from _linear("c_attn", c.n_embd, 3 * c.n_embd, c.attention_bias)
        yield from _linear("c_proj", c.n_embd, c.n_embd, True)

    def cached(self, layer: int, materialized: bool = False) -> list[tuple[int, int]]:
        return [(self.c.n_head, width) for width in self.head_widths]

    @property
    def beyond_gpt2(self) -> list[str]:
        return []


class MultiHeadLatent(Attention):
    """DeepSeek-V2's (arXiv:2405.04434): every head expands one latent (see model_mlx.py)."""

    fields = (
        "kv_lora_rank",
        "kv_lora_ranks",
        "q_lora_rank",
        "qk_rope_head_dim",
        "v_head_dim",
        "latent_norm",
    )
    biased = False

    @classmethod
    def resolve(cls, c: ModelConfig) -> None:
        if c.kv_lora_ranks is not None:
            if len(c.kv_lora_ranks) != c.n_layer or min(c.kv_lora_ranks) < 1:
                raise UserError(
                    f"--kv-lora-ranks needs {c.n_layer} widths of at least 1, one for each layer, "
                    f"not {' '.join(map(str, c.kv_lora_ranks))}"
                )
            if c.kv_lora_rank not in (None, max(c.kv_lora_ranks)):
                raise UserError(
                    f"--kv-lora-rank {c.kv_lora_rank} is not the largest of --kv-lora-ranks; "
                    f"use {max(c.kv_lora_ranks)}, or leave out one of the two"
                )
            c.kv_lora_rank = max(c.kv_lora_ranks)
        if c.kv_lora_rank is None:
            c.kv_lora_rank = max(1, c.n_embd // 2)
        if c.v_head_dim is None:
            c.v_head_dim = c.n_embd // c.n_head
        for name in ("kv_lora_rank", "v_head_dim", "q_lora_rank"):
            value = getattr(c, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} must be at least 1, not {value}")
        if c.qk_rope_head_dim < 0 or c.qk_rope_head_dim % 2:
            raise UserError(
                f"--qk-rope-head-dim must be even and not negative, not {c.qk_rope_head_dim}"
            )

    @property
    def ranks(self) -> list[int]:
        """Width of the latent of every layer, R."""
        assert self.c.kv_lora_rank
        return self.c.kv_lora_ranks or [self.c.kv_lora_rank] * self.c.n_layer

    @property
    def text(self) -> str:
        ranks = self.c.kv_lora_ranks or self.ranks[:1]
        return f"Multi-head Latent Attention, kv_lora_rank {', '.join(map(str, ranks))}"

    @property
    def cache_text(self) -> str:
        return f"latents {' or '.join(map(str, sorted(set(self.ranks))))} wide"

    @property
    def head_widths(self) -> tuple[int, int]:
        c = self.c
        assert c.v_head_dim
        return c.n_embd // c.n_head + c.qk_rope_head_dim, c.v_head_dim

    def tensors(self, layer: int) -> Tensors:
        c, rank, (key_width, value_width) = self.c, self.ranks[layer], self.head_widths
        q_width = c.n_head * key_width
        # [q (or its latent) | kv latent | shared RoPE key]
        width = (c.q_lora_rank or q_width) + rank + c.qk_rope_head_dim
        yield from _linear("c_attn", c.n_embd, width, c.attention_bias)
        if c.latent_norm:
            yield "kv_a_layernorm.weight", (rank,)
        if c.q_lora_rank:
            yield from _linear("q_b_proj", c.q_lora_rank, q_width, False)
            if c.latent_norm:
                yield "q_a_layernorm.weight", (c.q_lora_rank,)
        up_width = c.n_head * (key_width - c.qk_rope_head_dim + value_width)
        yield from _linear("kv_b_proj", rank, up_width, False)
        yield from _linear("c_proj", c.n_head * value_width, c.n_embd, True)

    def cached(self, layer: int, materialized: bool = False) -> list[tuple[int, int]]:
        if materialized:
            return [(self.c.n_head, width) for width in self.head_widths]
        return [(1, self.latent_widths[layer])]

    @property
    def latent_widths(self) -> list[int]:
        return [rank + self.c.qk_rope_head_dim for rank in self.ranks]

    def score_flops(self, on_latents: bool = False) -> int:
        if not on_latents:
            return super().score_flops()
        # Scores are R + P wide, the sum of the latents R.
        return 2 * self.c.n_head * sum(2 * r + self.c.qk_rope_head_dim for r in self.ranks)

    def kept_values(self) -> float:
        return super().kept_values() + self.cached_values() / self.c.n_layer


KINDS: dict[AttentionName, type[Attention]] = {"mla": MultiHeadLatent, "mha": MultiHead}


def meaningless_fields(attention: AttentionName) -> list[str]:
    """Fields of the other kinds, which mean nothing to this one."""
    names = dict.fromkeys(name for kind in KINDS.values() for name in kind.fields)
    return [name for name in names if name not in KINDS[attention].fields]


def _linear(name: str, width_in: int, width_out: int, bias: bool | None) -> Tensors:
    yield f"{name}.weight", (width_out, width_in)
    if bias:
        yield f"{name}.bias", (width_out,)
