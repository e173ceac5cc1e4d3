"""What a call of a subject must compute and move, from shapes alone."""

from mlx_mla.model.config import ModelConfig
from mlx_mla.model.estimate import BYTES, forward_flops_per_token
from mlx_mla.model.weights import num_parameters, parameter_shapes


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights in the compute type."""
    return num_parameters(config) * BYTES[dtype]


def cache_bytes(config: ModelConfig, kind: str, dtype: str) -> int:
    """Bytes of the decoding cache per token of context, all layers."""
    if kind == "none":
        return 0
    return config.kind.cached_values(materialized=kind == "materialized") * BYTES[dtype]


def decode_flops(config: ModelConfig, kind: str, context: int) -> float:
    """FLOPs of decoding one token after `context` cached ones; without a cache see
    forward_flops_per_token."""
    c = config
    matrices = sum(
        s[0] * s[1] for n, s in parameter_shapes(c).items() if len(s) == 2 and "wpe" not in n
    )
    return 2.0 * matrices + c.kind.score_flops(on_latents=kind == "latent") * context


def prompt_flops(config: ModelConfig, context: int) -> float:
    """FLOPs of reading a prompt of `context` tokens and choosing the next one: the head's product
    is needed for the last position alone."""
    assert config.vocab_size
    head = 2.0 * config.vocab_size * config.n_embd
    return context * (forward_flops_per_token(config, context) - head) + head
