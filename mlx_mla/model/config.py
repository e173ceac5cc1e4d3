"""Every setting of the model, and its validation."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional

from mlx_mla.errors import UserError, flag
from mlx_mla.fields import Bounds, at_least_1, check_bounds, fraction, not_negative, typed
from mlx_mla.model.attention import ATTENTIONS, Attention, AttentionName, meaningless_fields

InitializerName = Literal["normal", "fan_in"]
TrainableName = Literal["all", "attention"]
BackendName = Literal["mlx", "torch"]
DeviceName = Literal["auto", "cpu", "gpu", "mps", "cuda"]
DType = Literal["float32", "bfloat16"]
InferenceDType = Literal["float32", "bfloat16", "float16"]

TOKENIZER_IDS: dict[str, int] = {"bytes": 257, "gpt2": 50257}
"""Token ids of each tokenizer: the 256 bytes, or GPT-2's byte pairs, and <|endoftext|>."""

Seed = Annotated[int, not_negative(2**63 - 1)]
"""A seed that every generator and TOML take."""

Width = Annotated[int, at_least_1(2**20)]
"""A width or a count of the model. More means a damaged file or a typing error, as for every upper
bound of the model's numbers."""
Decay = Annotated[float, fraction("be at least 0 and below 1", below_1=True)]


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Shape of the transformer, as config.json holds it; names are those of GPT-2 and DeepSeek."""

    attention: AttentionName = "mla"
    """"mla" caches one latent per token; "mha" is GPT-2's own attention."""
    n_layer: Annotated[int, at_least_1(1000)] = 12
    """Transformer blocks."""
    n_head: Width = 12
    """Attention heads; must divide n_embd, or come with head_dim."""
    n_embd: Width = 768
    """Width of the residual stream."""
    n_inner: Optional[Width] = None
    """Width of the MLP. None: 4 x n_embd; with "swiglu" 8/3 x n_embd, rounded up to a multiple of
    64, which gives about as many parameters."""
    n_positions: Width = 1024
    """Longest context, in tokens."""
    vocab_size: Optional[Width] = None
    """Rows of the embedding. None: as many as the tokenizer has."""
    position_embedding_type: Optional[Literal["learned", "rope"]] = None
    """"learned" adds a table of positions to the embedding. "rope" rotates queries and keys: all of
    them with "mha", a part beside the latent with "mla". None: "rope" if qk_rope_head_dim > 0."""
    head_dim: Optional[Width] = None
    """Width of a head's queries, keys and values; with "mla", of their part without RoPE
    (DeepSeek's qk_nope_head_dim). None: n_embd / n_head."""
    num_key_value_heads: Optional[Width] = None
    """MHA: heads of keys and values, each shared by a group of query heads (grouped-query
    attention; 1 is multi-query attention). None: n_head."""
    kv_lora_rank: Optional[Width] = None
    """MLA: width of the cached key/value latent. None: n_embd / 2, or the largest of kv_lora_ranks,
    or head_dim with attention_k_eq_v."""
    kv_lora_ranks: Optional[list[Width]] = None
    """MLA: the width of each layer that has a latent of its own, if they differ. None: kv_lora_rank
    for all."""
    num_kv_shared_layers: Annotated[int, not_negative(1000)] = 0
    """MLA: this many last layers cache nothing. Each reads the latent (and the RoPE key) of the
    layer before them through its own up-projection (Gemma 3n's name). 0: none."""
    q_lora_rank: Optional[Width] = None
    """MLA: width of a query latent, as in DeepSeek-V2. None: queries are projected directly."""
    qk_rope_head_dim: Annotated[int, not_negative(2**20)] = 0
    """MLA: width of the decoupled RoPE part of queries and keys; it replaces the learned positions.
    0: off."""
    v_head_dim: Optional[Width] = None
    """MLA: width of a value head. None: head_dim."""
    attention_k_eq_v: bool = False
    """MLA without an up-projection: the latent is the value of every head and, beside the RoPE
    part, its key. Heads are kv_lora_rank wide (Gemma 4's name; Grouped-Tied Attention,
    arXiv:2505.21487)."""
    latent_norm: bool = False
    """MLA: RMSNorm on the latents, as in DeepSeek-V2."""
    attention_bias: Optional[bool] = None
    """Bias on the attention's projections that read x. None: only for "mha" with "layer_norm", as
    in GPT-2."""
    attention_out_bias: Optional[bool] = None
    """Bias on the attention's output projection. None: only with "layer_norm"."""
    mlp_bias: Optional[bool] = None
    """Biases of the MLP. None: only with "layer_norm"."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalization before attention, MLP and output head: GPT-2's LayerNorm, or Llama's RMSNorm,
    which has no bias."""
    rope_theta: Annotated[float, Bounds("be at least 1", 1, 1e12)] = 10000.0
    """Base of RoPE's wavelengths."""
    activation_function: Literal["gelu_new", "gelu", "swiglu"] = "gelu_new"
    """"gelu_new" is GPT-2's tanh approximation, "gelu" the exact function, "swiglu" Llama's gated
    SiLU, silu(gate(x)) * up(x)."""
    layer_norm_epsilon: Annotated[float, Bounds("be at least 1e-12", 1e-12, 1)] = 1e-5
    """Added to the variance in every LayerNorm, and to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output head, as in GPT-2. --no-tie-word-embeddings: a matrix of its
    own, as in minGPT."""
    dropout: Decay = 0.0
    """Dropout in training, on embeddings and on the output of every attention and MLP."""

    def resolved(self, tokenizer_size: Optional[int] = None) -> "ModelConfig":
        """A copy with all defaults filled in and every value checked.

        Args:
            tokenizer_size: Number of token ids of the model's tokenizer, if known.

        Raises:
            UserError: For an impossible value; the message names the option.
        """
        c = dataclasses.replace(self)
        check_bounds(c)
        as_wide_as_latent = c.attention_k_eq_v and c.kv_lora_rank is not None
        if c.head_dim is None and not as_wide_as_latent and c.n_embd % c.n_head:
            raise UserError(
                f"{flag('n_embd')} {c.n_embd} is not divisible by {flag('n_head')} {c.n_head}; try "
                f"{flag('n_embd')} {max(1, round(c.n_embd / c.n_head)) * c.n_head}"
            )
        if c.n_inner is None:
            gated = c.activation_function == "swiglu"
            c.n_inner = -(-8 * c.n_embd // 192) * 64 if gated else 4 * c.n_embd
        if c.vocab_size is None:
            if tokenizer_size is None:
                raise UserError("--vocab-size is needed, since no tokenizer gives it")
            c.vocab_size = tokenizer_size
        if tokenizer_size is not None and c.vocab_size < tokenizer_size:
            raise UserError(
                f"--vocab-size {c.vocab_size} is smaller than the tokenizer's {tokenizer_size} "
                f"ids; use at least {tokenizer_size}, or leave it out"
            )
        of_gpt2 = c.norm == "layer_norm"
        if c.attention_bias is None:
            c.attention_bias = of_gpt2 and ATTENTIONS[c.attention].biased
        if c.attention_out_bias is None:
            c.attention_out_bias = of_gpt2
        if c.mlp_bias is None:
            c.mlp_bias = of_gpt2
        for name in meaningless_fields(c.attention):
            if getattr(c, name):
                raise UserError(
                    f"{flag(name)} has no meaning with --attention {c.attention}; leave it out"
                )
        ATTENTIONS[c.attention].resolve(c)
        return c

    @property
    def attention_spec(self) -> Attention:
        """The attention of a resolved configuration: its shapes, widths, costs and description."""
        return ATTENTIONS[self.attention](self)

    @property
    def family(self) -> str:
        """The model whose blocks these are most like, in a word."""
        return "GPT-2" if self.norm == "layer_norm" else "Llama"

    @property
    def beyond_gpt2(self) -> list[str]:
        """The flags of a resolved configuration that a GPT-2 has no name for; empty for a GPT-2."""
        beyond = self.attention_spec.beyond_gpt2 + self.flags_except(norm="layer_norm")
        if self.activation_function == "swiglu":
            beyond.append("--activation-function swiglu")
        return beyond

    def flags_except(self, **expected: Any) -> list[str]:
        """The flags of those fields that have another value than the one expected."""
        own = {name: getattr(self, name) for name in expected}
        return [f"{flag(n)} {value}" for n, value in own.items() if value != expected[n]]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, without those that are None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> "ModelConfig":
        """The model's fields of a config.json, resolved; others are ignored. UserError names the
        file."""
        config = cls(**typed(cls, values, where))
        try:
            return config.resolved()
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
