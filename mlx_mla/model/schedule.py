"""The learning rate of each step."""

import math

from mlx_mla.model.train_config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the step after `step` finished ones: linear warmup, then --lr-schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "wsd":
        # Warmup, stable, decay (MiniCPM, arXiv:2404.06395), with the linear decay of
        # arXiv:2405.18392.
        decay = round((config.decay_fraction or 0) * config.steps)
        decay = max(1, min(decay, config.steps - config.warmup_steps))
        left = min(1.0, max(0, config.steps - step) / decay)
    else:
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def muon_rate(config: TrainConfig, rate: float) -> float:
    """Muon's learning rate when AdamW's is `rate`. Both follow the same schedule."""
    assert config.muon_learning_rate
    return rate * config.muon_learning_rate / config.learning_rate
