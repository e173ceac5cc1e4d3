"""GPT-2 with Multi-head Latent Attention (MLA), for PyTorch and transformers.

This file needs `configuration_mla_gpt2.py` alone: copies of both travel in every model folder
(`auto_map` in config.json), so

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

gives the model that `model_mlx.py` gives in MLX, from the same `model.safetensors`.

MLA (DeepSeek-V2, arXiv:2405.04434, section 2.1) caches one narrow latent per token instead of keys
and values per head. Training and prefill expand the latents; a step that decodes one token, or a
few over many cached latents, absorbs the up projection into the query and the output, and reads the
latents as they are. The cache is transformers' own: keys hold the latents (and the shared RoPE
key), values have width 0. The last `num_kv_shared_layers` (Gemma 3n's name) cache nothing: each
expands the latents of the last layer before them with an up projection of its own.

Shape legend, used as suffixes of tensor names:
    B batch   L query length   T key length (cached + new)   D n_embd   H n_head
    N query/key head width   V value head width   P RoPE head width   R kv_lora_rank
    G num_key_value_heads (of multi-head attention)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

# In this form transformers finds it in a model folder.
from .configuration_mla_gpt2 import MLAGPT2Config

# The cost of writing a value that the next product reads, in multiply-adds (as in model_mlx.py).
WRITTEN_VALUE = 100
# Queries from which keys and values are worth copying on a CPU, to one width or to float32.
FUSED_QUERIES = 32


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Scaled dot-product attention; causal where there is no mask and more than one query.

    Keys and values may have fewer heads than queries, by a whole factor, and other widths.
    """
    width = v.shape[-1]
    fused = q.device.type == "cpu" and q.shape[-2] >= FUSED_QUERIES
    if q.device.type == "mps":
        # It has given silently wrong results for strided inputs (pytorch#163597).
        groups = q.shape[1] // k.shape[1]
        q, k, v = q.contiguous(), k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    elif fused and q.dtype == torch.bfloat16 and mask is None:
        # Its flash attention takes twice as long in bfloat16, without AMX.
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, scale).bfloat16()
    elif fused and width != k.shape[-1]:
        # Its flash attention takes one width; zeros change neither scores nor values.
        widest = max(width, k.shape[-1])
        q, k, v = (F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[-2] > 1,
        scale=scale,
        enable_gqa=k.shape[1] != q.shape[1],
    )
    return out[..., :width]


class ResidualProjection(nn.Linear):
    """A projection that writes to the residual stream, which GPT-2 starts smaller."""


class MultiHeadAttention(nn.Module):
    """GPT-2's attention: keys and values of every head are computed once and cached.

    With fewer heads of keys and values than of queries it is grouped-query attention
    (arXiv:2305.13245), with one multi-query attention (arXiv:1911.02150).
    """

    def __init__(self, config: MLAGPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        q_width = config.n_head * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        # One matmul reads x: [q | k | v].
        self.widths = [q_width, kv_width, kv_width]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.attention_bias)
        self.c_proj = ResidualProjection(q_width, config.n_embd, bias=config.attention_out_bias)

    def forward(
        self, x_BLD: torch.Tensor, mask: Any, cache: Any, rotation: Any, latent: Any = None
    ) -> tuple[torch.Tensor, Any]:
        B, L, _ = x_BLD.shape
        q_BHLN, k_BGLN, v_BGLN = (
            a.view(B, L, -1, self.head_dim).transpose(1, 2)
            for a in self.c_attn(x_BLD).split(self.widths, dim=-1)
        )
        if rotation is not None:
            q_BHLN, k_BGLN = rotate(q_BHLN, rotation), rotate(k_BGLN, rotation)
        if cache is not None:
            k_BGLN, v_BGLN = cache.update(k_BGLN, v_BGLN, self.layer)
        out_BHLV = attend(q_BHLN, k_BGLN, v_BGLN, mask, self.scale)
        return self.c_proj(out_BHLV.transpose(1, 2).reshape(B, L, -1)), latent


class LatentAttention(nn.Module):
    """Multi-head Latent Attention; the cache holds latents (B, 1, T, R + P) and values of width 0.

    Attributes:
        layer: This layer's number.
        latent_layer: Number of the layer whose latents it reads: its own, or the last before the
            layers that share.
    """

    def __init__(self, config: MLAGPT2Config, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.qk_nope_head_dim = config.head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.latent_layer = min(layer, config.n_layer - config.num_kv_shared_layers - 1)
        ranks = config.kv_lora_ranks
        self.kv_lora_rank = ranks[self.latent_layer] if ranks else config.kv_lora_rank or 0
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.scale = qk_head_dim**-0.5
        self.materialize_cache = False

        q_width = config.n_head * qk_head_dim
        has_latent = self.layer == self.latent_layer
        latent_width = self.kv_lora_rank + self.qk_rope_head_dim if has_latent else 0
        # One matmul reads x: [q (or its latent) | kv latent | shared RoPE key].
        self.widths = [config.q_lora_rank or q_width, latent_width]
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=config.attention_bias)
        self.q_b_proj = (
            nn.Linear(config.q_lora_rank, q_width, bias=False) if config.q_lora_rank else None
        )
        norms = config.latent_norm
        self.kv_a_layernorm = (
            nn.RMSNorm(self.kv_lora_rank, eps=config.layer_norm_epsilon)
            if norms and has_latent
            else None
        )
        self.q_a_layernorm = (
            nn.RMSNorm(config.q_lora_rank, eps=config.layer_norm_epsilon)
            if norms and config.q_lora_rank
            else None
        )
        # Rows of W_up: for each head its N key rows, then its V value rows (as DeepSeek's
        # kv_b_proj).
        up_width = config.n_head * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = (
            None if config.attention_k_eq_v else nn.Linear(self.kv_lora_rank, up_width, bias=False)
        )
        self.c_proj = ResidualProjection(
            config.n_head * self.v_head_dim, config.n_embd, bias=config.attention_out_bias
        )

    def forward(
        self, x_BLD: torch.Tensor, mask: Any, cache: Any, rotation: Any, latent: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from x.

        Args:
            latent: What the layer before returned, which a layer without its own latents reads.

        Returns:
            The output (B, L, D), and the latents (B, 1, T, R + P): with a cache of latents all that
            are in it, else those of x.
        """
        B, L, _ = x_BLD.shape
        q, latent_BLW = parts(self.c_attn(x_BLD), self.widths)
        if self.q_b_proj is not None:
            q = self.q_b_proj(q if self.q_a_layernorm is None else self.q_a_layernorm(q))
        q_BHLN = q.view(B, L, self.n_head, -1).transpose(1, 2)
        if self.qk_rope_head_dim:
            q_nope, q_rope = q_BHLN.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
            q_BHLN = torch.cat([q_nope, rotate(q_rope, rotation)], dim=-1)
        if self.layer == self.latent_layer:
            latent = self._latent(latent_BLW, rotation)

        if self.materialize_cache:
            k, v = self._expand(latent)
            if cache is not None:
                k, v = cache.update(k, v, self.layer)
            out = attend(q_BHLN, k, v, mask, self.scale)
        else:
            if cache is not None and self.layer == self.latent_layer:
                latent, _ = cache.update(latent, latent[..., :0], self.layer)
            absorb = cache is not None and can_absorb(self.kv_b_proj, x_BLD.device)
            if absorb and self._absorbing_is_cheaper(L, latent.shape[2]):
                out = self._attend_absorbed(q_BHLN, latent, mask)
            else:
                out = attend(q_BHLN, *self._expand(latent), mask, self.scale)
        return self.c_proj(out.transpose(1, 2).reshape(B, L, -1)), latent

    def _latent(self, latent_BLW: torch.Tensor, rotation: Any) -> torch.Tensor:
        """Latents and RoPE keys (B, 1, L, R + P) of what c_attn gives for them."""
        c_BLR, k_rope_BLP = parts(latent_BLW, [self.kv_lora_rank, self.qk_rope_head_dim])
        if self.kv_a_layernorm is not None:
            c_BLR = self.kv_a_layernorm(c_BLR)
        if not self.qk_rope_head_dim:
            return c_BLR[:, None]
        return torch.cat([c_BLR[:, None], rotate(k_rope_BLP[:, None], rotation)], dim=-1)

    def _expand(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (B, H, T, N + P) and values (B, H, T, V) of latents (B, 1, T, R + P). Without W_up,
        there is one head of both, shared by all queries."""
        B, _, T, _ = latent.shape
        c, k_rope = parts(latent, [self.kv_lora_rank, self.qk_rope_head_dim])
        if self.kv_b_proj is None:
            return latent, c
        kv = self.kv_b_proj(c).view(B, T, self.n_head, -1).transpose(1, 2)
        k, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        if self.qk_rope_head_dim:
            k = torch.cat([k, k_rope.expand(B, self.n_head, T, -1)], dim=-1)
        return k, v

    def _absorbing_is_cheaper(self, L: int, T: int) -> bool:
        """True if L queries cost less on T latents than on the keys and values they expand to.

        The cost of a head is its multiply-adds, and the values written between two products.
        Absorbed attention also writes its scores; fused attention over expanded keys does not.
        """
        N, P = self.qk_nope_head_dim, self.qk_rope_head_dim
        V, R = self.v_head_dim, self.kv_lora_rank
        if self.kv_b_proj is None:
            return L == 1
        expanded = T * (N + V) * (R + WRITTEN_VALUE) + L * T * (N + P + V)
        absorbed = L * R * (N + V + 2 * WRITTEN_VALUE) + L * T * (2 * (R + P) + WRITTEN_VALUE)
        return L == 1 or absorbed <= expanded

    def _attend_absorbed(self, q: torch.Tensor, latent: torch.Tensor, mask: Any) -> torch.Tensor:
        """Queries (B, H, L, N + P) against the cached latents (B, 1, T, R + P); returns (B, H, L,
        V)."""
        B, H, L, _ = q.shape
        T, R = latent.shape[2], self.kv_lora_rank
        w_uk = w_uv = None
        if self.kv_b_proj is not None:
            w_HOR = self.kv_b_proj.weight.view(H, -1, R)
            w_uk, w_uv = w_HOR.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_nope, q_rope = parts(q, [self.qk_nope_head_dim, self.qk_rope_head_dim])
        q_BHLR = q_nope if w_uk is None else by_head(q_nope, w_uk)
        if self.qk_rope_head_dim:
            q_BHLR = torch.cat([q_BHLR, q_rope], dim=-1)
        # Heads and queries go in as rows of one matrix, so that the latents are read once and not
        # once a head. Values as wide as the keys: dropping the RoPE part of the result is cheaper
        # than copying the cache.
        if mask is None:  # by transformers' rule: one query, or no token before the L
            mask = torch.ones(L, T, dtype=torch.bool, device=q.device).tril()[None, None]
            mask = mask | (L == 1)
        mask = mask.expand(-1, H, L, T).reshape(-1, 1, H * L, T)
        if q.device.type == "mps":  # it rounds scores to the type of the queries
            q_BHLR, latent = q_BHLR.float(), latent.float()
        out = attend(q_BHLR.reshape(B, 1, H * L, -1), latent, latent, mask, self.scale).to(q.dtype)
        out_BHLR = out[..., :R].reshape(B, H, L, R)
        return out_BHLR if w_uv is None else by_head(out_BHLR, w_uv.transpose(-1, -2))


def can_absorb(projection: nn.Module | None, device: torch.device) -> bool:
    """True if the weight of a projection can be read as a plain matrix.

    It cannot where a wrapper adds to it (LoRA), a tensor subclass stores it in another form
    (torchao), or a hook moves it to the device for the projection's own call (offloading).
    """
    if projection is None:
        return True
    if type(projection) is not nn.Linear:
        return False
    weight = projection.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.device == device


def parts(x: torch.Tensor, widths: list[int]) -> Any:
    """Split x along the last axis into these widths; None for a width of 0. An empty tensor would
    be one more for the backward pass to join, and might fail on MPS."""
    present = iter(x.split([w for w in widths if w], dim=-1))
    return [next(present) if w else None for w in widths]


def by_head(x_BHLN: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Multiply each head's rows, of all sequences, by its matrix of w (H, N, R), so that it is read
    once."""
    B, H, L, _ = x_BHLN.shape
    return (x_BHLN.transpose(0, 1).reshape(H, B * L, -1) @ w).view(H, B, L, -1).transpose(0, 1)


def rotation_of(
    positions: torch.Tensor, width: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the RoPE angles, (B, 1, L, width / 2), in float32."""
    frequency = theta ** (
        -torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    )
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1) of the last axis (RoFormer, arXiv:2104.09864)."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """Llama's gated SiLU of [gate | up], half as wide (arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "swiglu": swiglu,
}


class MLP(nn.Module):
    def __init__(self, config: MLAGPT2Config):
        super().__init__()
        # One matmul reads x: of "swiglu" [gate | up].
        width = 2 * config.n_inner if config.activation_function == "swiglu" else config.n_inner
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.mlp_bias)
        self.c_proj = ResidualProjection(config.n_inner, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


def norm(config: MLAGPT2Config) -> nn.Module:
    """A norm of the residual stream."""
    norm_class = nn.LayerNorm if config.norm == "layer_norm" else nn.RMSNorm
    return norm_class(config.n_embd, eps=config.layer_norm_epsilon)


class Block(nn.Module):
    def __init__(self, config: MLAGPT2Config, layer: int):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = (LatentAttention if config.attention == "mla" else MultiHeadAttention)(
            config, layer
        )
        self.ln_2 = norm(config)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, mask: Any, cache: Any, rotation: Any, latent: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """The new x, and the latents for a next block that has none of its own."""
        attended, latent = self.attn(self.ln_1(x), mask, cache, rotation, latent)
        x = x + self.drop(attended)
        return x + self.drop(self.mlp(self.ln_2(x))), latent


class MLAGPT2PreTrainedModel(PreTrainedModel):
    config_class = MLAGPT2Config
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this only for modules that hold parameters themselves.
        std = self.config.initializer_range
        if isinstance(module, ResidualProjection):
            std /= (2 * self.config.n_layer) ** 0.5
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class MLAGPT2Model(MLAGPT2PreTrainedModel):
    """The transformer without its head: token ids to hidden states."""

    def __init__(self, config: MLAGPT2Config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        learned = config.position_embedding_type == "learned"  # RoPE lives in the attention
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if learned else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_f = norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """The last hidden state (B, L, D), the cache, and with `output_hidden_states` n_layer + 1
        states (B, L, D): what each block reads, then the last hidden state, as in GPT-2.

        Raises:
            ValueError: Past n_positions, or for `output_attentions`: fused attention has none.
        """
        if output_attentions:
            raise ValueError(
                "output_attentions is not supported: the attention is fused and never holds its "
                "weights; leave it out"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        h = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if position_ids is None:
            # The length bounds the positions, so nothing has to be read from the device.
            check_positions(past + h.shape[1], self.config.n_positions)
            position_ids = torch.arange(past, past + h.shape[1], device=h.device)[None]
        elif past + h.shape[1] > self.config.n_positions:
            check_positions(int(position_ids.max()) + 1, self.config.n_positions)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.wpe is not None:
            h = h + self.wpe(position_ids)
        rotation = self.rotation(position_ids)
        h = self.drop(h)
        latent, states = None, []
        for block in self.h:
            states.append(h)
            h, latent = block(h, mask, past_key_values, rotation, latent)
        h = self.ln_f(h)
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values,
            hidden_states=(*states, h) if output_hidden_states else None,
        )

    def rotation(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `rotate` needs at these positions (B, L); None where positions are learned."""
        c = self.config
        if self.wpe is not None:
            return None
        width = c.qk_rope_head_dim if c.attention == "mla" else c.head_dim
        return rotation_of(position_ids, width, c.rope_theta)


def check_positions(end: int, n_positions: int) -> None:
    if end > n_positions:
        raise ValueError(
            f"{end} tokens of context do not fit this model's n_positions={n_positions}; shorten "
            "the prompt or generate fewer tokens"
        )


class MLAGPT2LMHeadModel(MLAGPT2PreTrainedModel, GenerationMixin):
    """The language model, by transformers' contract; its head is tied to the embedding, or a
    matrix of its own (`tie_word_embeddings` false)."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # the Trainer's question whether to pass num_items_in_batch

    def __init__(self, config: MLAGPT2Config):
        super().__init__(config)
        self.transformer = MLAGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def materialize_cache(self, on: bool) -> None:
        """Cache expanded keys and values (True) or latents (False, the default). No effect on
        MHA."""
        for block in self.transformer.h:
            if isinstance(block.attn, LatentAttention):
                block.attn.materialize_cache = on

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers'; every row is then a token's, and none is padding."""
        self.config.tokenizer_size = None
        return super().resize_token_embeddings(*args, **kwargs)

    def _end_of_text(self) -> int | None:
        ends = getattr(self.config, "eos_token_id", None)
        return ends[0] if isinstance(ends, (list, tuple)) else ends

    def _past_positions(
        self, position_ids: torch.Tensor | None, past_key_values: Any
    ) -> torch.Tensor | None:
        """Which tokens of a batch stand past the position table, bool (B, L); None where no row can
        be that long, where rows do not differ, and where there is no end of text to give them."""
        if position_ids is None or len(position_ids) == 1 or self._end_of_text() is None:
            return None
        seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if seen + position_ids.shape[1] <= self.config.n_positions:
            return None
        return position_ids >= self.config.n_positions

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, vocab_size), the cache, and with `labels` (B, L) their cross-entropy.

        Rows of the vocabulary that pad it get the lowest finite logit, but not in training, where
        a loss may use every logit (label smoothing, entropy).

        A row of a batch that has its own positions and becomes too long can only end: its one
        likely token is the end of text, and the other rows continue.

        Args:
            num_items_in_batch: Divides the summed loss, as the Trainer asks when it accumulates
                gradients. None: the number of labels.

        Raises:
            ValueError: Past n_positions otherwise, or for `output_attentions`.
        """
        past = self._past_positions(position_ids, past_key_values)
        if past is not None:
            assert position_ids is not None
            position_ids = position_ids.clamp(max=self.config.n_positions - 1)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        out = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            return_dict=True,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        if self.config.tokenizer_size is not None and not self.training:
            logits[..., self.config.tokenizer_size :] = torch.finfo(logits.dtype).min
        if past is not None:
            only = torch.full_like(logits[0, 0], torch.finfo(logits.dtype).min)
            only[self._end_of_text()] = 0
            logits = torch.where(past[:, keep, None], only, logits)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
        )
