"""The devices on which attention is fused in training, so that it stores no matrix of scores.

The rules come from the sources of MLX 0.32 and PyTorch 2.13. This module imports no framework.
"""

from typing import Literal

from mlx_mla.model.train_config import TrainConfig

Device = Literal["metal", "cuda", "cpu"]

METAL_WIDTHS = {64, 72, 80, 96, 128, 192, 256}  # of keys and values; the model pads the narrower
METAL_SHORTEST = 9  # minimum number of queries with a fused gradient
CPU_SHORTEST = 32  # minimum queries for which the PyTorch model pads keys and values to one width


def fused_by_mlx(device: Device, config: TrainConfig) -> bool:
    """True if MLX fuses attention in the forward and backward passes of a resolved
    configuration."""
    widths = config.model.attention_spec.head_widths
    if device == "metal":
        return max(widths) in METAL_WIDTHS and config.context >= METAL_SHORTEST
    if device == "cuda":  # by cuDNN
        fits = all(w <= 128 and w % 8 == 0 for w in widths) and config.context % 128 == 0
        return fits and config.dtype == "bfloat16"
    return False


def fused_by_torch(device: str, config: TrainConfig) -> bool:
    """True if PyTorch fuses attention in the forward and backward passes."""
    if device == "cpu":  # for few queries with keys wider than values, a copy does not pay off
        keys, values = config.model.attention_spec.head_widths
        return keys == values or config.context >= CPU_SHORTEST
    return device == "cuda"
