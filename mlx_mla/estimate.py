"""What a configuration costs, from its shapes alone: parameters, FLOPs, memory, cache bytes."""

import dataclasses

from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.weights import num_parameters, parameter_shapes

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The figures that `train --dry-run` prints."""

    parameters: int
    """Trainable parameters, the tied head counted once."""
    forward_flops_per_token: int
    """Multiply-adds counted as 2, averaged over the positions of a sequence, head included."""
    train_flops_per_token: int
    """Forward and backward: three times the forward pass."""
    weights_bytes: int
    """float32 weights, and the bfloat16 copy where one is made."""
    gradient_bytes: int
    optimizer_bytes: int
    """AdamW's two moments, float32."""
    activation_bytes: int
    """Kept for the backward pass of one micro-batch, and worked with at its peak."""
    cache_bytes_per_token: int
    """Decoding cache over all layers, in bfloat16."""
    mha_cache_bytes_per_token: int
    """What multi-head attention of the same shape would cache."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def estimate(config: TrainConfig, fused_attention: bool) -> Estimate:
    """Estimate a resolved training configuration.

    Args:
        fused_attention: Whether the device's attention kernel keeps no score matrix (Metal, CUDA).
    """
    m, T = config.model, config.context
    n = num_parameters(m)
    flops = forward_flops_per_token(m, T)
    width = BYTES[config.dtype]
    tokens = config.batch_size * T
    copy = n * width if config.dtype != "float32" else 0
    return Estimate(
        parameters=n,
        forward_flops_per_token=flops,
        train_flops_per_token=3 * flops,
        weights_bytes=4 * n + copy,
        gradient_bytes=4 * n + copy,
        optimizer_bytes=8 * n,
        activation_bytes=tokens * _activation_bytes_per_token(m, T, width, fused_attention),
        cache_bytes_per_token=cache_bytes_per_token(m, 2),
        mha_cache_bytes_per_token=2 * m.n_layer * m.n_embd * 2,
    )


def forward_flops_per_token(m: ModelConfig, context: int) -> int:
    """FLOPs of the forward pass per token, the mean over `context` causal positions."""
    matrices = sum(
        shape[0] * shape[1]
        for name, shape in parameter_shapes(m).items()
        if len(shape) == 2 and "wpe" not in name  # wte is the head's matrix
    )
    key_width = m.n_embd // m.n_head + m.qk_rope_head_dim
    value_width = m.v_head_dim or m.n_embd // m.n_head
    mean_keys = (context + 1) / 2
    attention = 2 * m.n_layer * m.n_head * (key_width + value_width) * mean_keys
    return int(2 * matrices + attention)


def cache_bytes_per_token(m: ModelConfig, bytes_per_value: int) -> int:
    """Bytes that decoding caches for one token of context, over all layers."""
    if m.attention == "mha":
        return m.n_layer * 2 * m.n_embd * bytes_per_value
    return sum(rank + m.qk_rope_head_dim for rank in m.latent_ranks) * bytes_per_value


def _activation_bytes_per_token(m: ModelConfig, context: int, width: int, fused: bool) -> int:
    """Bytes per token at the peak of a step: what every block keeps, and what one block works with.

    The counts were fitted to `mx.get_peak_memory` of compiled float32 steps on a CPU, over widths,
    lengths, heads and vocabularies (docs/diary.md); on Metal and CUDA they are not checked yet.
    """
    assert m.n_inner and m.vocab_size
    value_width = m.n_head * (m.v_head_dim or m.n_embd // m.n_head)
    key_width = m.n_head * (m.n_embd // m.n_head + m.qk_rope_head_dim)
    latent = cache_bytes_per_token(m, 1) / m.n_layer if m.attention == "mla" else 0
    scores = 0 if fused else m.n_head * context
    # Residual stream and both LayerNorms, then q, k, v and their output, then GELU's steps.
    kept = 4 * m.n_embd + latent + 2 * key_width + 2 * value_width + 4.5 * m.n_inner + scores
    working = 4 * scores + 5 * m.n_inner
    head = 12 * m.vocab_size  # logits, their exponentials and their gradient, in float32
    return int((m.n_layer * kept + working) * width + head)
