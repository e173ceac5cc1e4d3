"""What a call of a subject must compute and move, from shapes alone."""

from mlx_mla.model.config import ModelConfig
from mlx_mla.model.estimate import BYTES, forward_flops_per_token
from mlx_mla.model.weights import parameter_shapes


def cache_bytes(config: ModelConfig, kind: str, dtype: str) -> int:
    """Bytes of the decoding cache per token of context, all layers."""
    if kind == "none":
        return 0
    return config.attention_spec.cached_values(materialized=kind == "materialized") * BYTES[dtype]


def flops(
    measure: str, config: ModelConfig, kind: str | None, batch: int, context: int, steps: int = 1
) -> float:
    """FLOPs of a call of a measure on sequences of `context` tokens, cached ones in decoding; 0
    where they are not counted."""
    forward = float(context * forward_flops_per_token(config, context)) if context else 0.0
    if measure == "decoding" and kind != "none":
        shapes = parameter_shapes(config).items()
        matrices = sum(s[0] * s[1] for n, s in shapes if len(s) == 2 and "wpe" not in n)
        scores = config.attention_spec.score_flops(on_latents=kind == "latent") * context
        return batch * steps * (2.0 * matrices + scores)
    if measure == "first token":  # the head's product is needed for the last position alone
        assert config.vocab_size
        return batch * (forward - (context - 1) * 2.0 * config.vocab_size * config.n_embd)
    return batch * forward * {"forward": 1, "decoding": steps, "training": 3}.get(measure, 0)
