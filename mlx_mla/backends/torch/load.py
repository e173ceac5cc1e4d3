"""Models in PyTorch, from weights or from a folder."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.model_torch import MLAGPT2Config, MLAGPT2LMHeadModel


def build_model(
    config: ModelConfig, weights: Mapping[str, np.ndarray], device: torch.device
) -> MLAGPT2LMHeadModel:
    """A model with the given float32 weights, in evaluation mode."""
    model = MLAGPT2LMHeadModel(MLAGPT2Config(**config.to_dict()))
    missing, unexpected = model.load_state_dict(
        {k: torch.tensor(w) for k, w in weights.items()}, strict=False
    )
    absent = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert missing == absent and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.to(device).eval()


def load(
    folder: Path, device: torch.device, dtype: InferenceDType = "float32"
) -> MLAGPT2LMHeadModel:
    """The package's own model with a folder's weights in a type; UserError if PyTorch cannot read
    it."""
    config = checkpoint.read_config(folder)
    if checkpoint.is_quantized(folder):
        raise UserError(f"{folder}: quantised by mlx-lm, which only MLX reads; use --backend mlx")
    model = build_model(config, checkpoint.read_weights(folder, config), device)
    return model.to(getattr(torch, dtype))
