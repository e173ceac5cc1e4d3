"""`--cache auto`: latents, or keys and values expanded once, by what a decoding step costs.

A step's costs that differ between the two, for a layer with H heads and B sequences of T tokens in
the cache:

    latent        B T H 2 (R + P) multiply + step
    materialized  B (T H (N + P + V) read + H (N + P + V) store)

The rates were fitted to steps of the 124M shapes (docs/decoding.md says how well they choose); they
hold for a kind of device, not for one machine, since only their ratios matter.
"""

import dataclasses
from typing import Literal

from mlx_mla.decoding.request import CacheKind
from mlx_mla.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rates:
    """Nanoseconds on a kind of device."""

    multiply: float
    """A multiply-add of attention on latents."""
    read: float
    """Reading a cached key or value and using it."""
    store: float
    """Putting a new key or value into its head's cache, beyond what absorbing the new query
    costs."""
    step: float
    """What a layer with latents takes beyond one without, whatever the batch is; negative where it
    takes less."""


RATES = {
    ("mlx", "cpu"): Rates(multiply=0.033, read=0.285, store=8.7, step=17_000),
    ("torch", "cpu"): Rates(multiply=0.024, read=0.175, store=16, step=43_000),
}


def cache_of(config: ModelConfig, cache: CacheKind) -> CacheKind:
    """What a model keeps where `cache` is asked for: multi-head attention has no latents, and those
    without an up-projection are keys and values already."""
    if config.attention == "mha" and cache == "latent":
        return "materialized"
    return "latent" if config.attention_k_eq_v and cache == "materialized" else cache


def choose_cache(
    config: ModelConfig, backend: str, device: str, batch: int, context: int
) -> Literal["latent", "materialized"]:
    """The cache whose decoding step is cheaper; where nobody has measured the device, the smaller
    one, latents.

    Args:
        config: A resolved configuration. Without latents there is no choice.
        backend: mlx or torch.
        device: The backend's kind of device: cpu; gpu (mlx), cuda or mps (torch).
        batch: Sequences that are decoded together.
        context: Tokens that the cache will hold for each, at most.
    """
    kind = config.kind
    if not kind.latent_widths:
        return "materialized"
    rates = RATES.get((backend, device))
    if rates is None or config.attention_k_eq_v:
        return "latent"
    values = kind.cached_values(materialized=True)
    latent = batch * context * config.n_head * 2 * sum(kind.latent_widths) * rates.multiply
    latent += config.n_layer * rates.step
    materialized = batch * (context * values * rates.read + values * rates.store)
    return "latent" if latent <= materialized else "materialized"
