"""What a call of a subject must compute and move, from shapes alone."""

from mlx_mla.config import ModelConfig
from mlx_mla.estimate import BYTES, cache_bytes_per_token
from mlx_mla.weights import num_parameters, parameter_shapes


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights in the compute type."""
    return num_parameters(config) * BYTES[dtype]


def cache_bytes(config: ModelConfig, kind: str, dtype: str) -> int:
    """Bytes of the decoding cache per token of context, all layers."""
    if kind == "none":
        return 0
    if kind == "materialized" and config.attention == "mla":
        keys = config.n_embd + config.n_head * config.qk_rope_head_dim
        return config.n_layer * (keys + config.n_head * (config.v_head_dim or 0)) * BYTES[dtype]
    return cache_bytes_per_token(config, BYTES[dtype])


def decode_flops(config: ModelConfig, kind: str, context: int) -> float:
    """FLOPs of decoding one token after `context` cached ones; without a cache see
    forward_flops_per_token."""
    c = config
    matrices = sum(
        s[0] * s[1] for n, s in parameter_shapes(c).items() if len(s) == 2 and "wpe" not in n
    )
    key = c.n_embd // c.n_head + c.qk_rope_head_dim
    value = c.v_head_dim or c.n_embd // c.n_head
    widths = c.n_layer * (key + value)
    if c.attention == "mla" and kind == "latent":
        widths = sum(2 * rank + c.qk_rope_head_dim for rank in c.latent_ranks)
    return 2.0 * matrices + 2.0 * c.n_head * widths * context
