"""Models in PyTorch, from weights or from a folder."""

from collections.abc import Mapping

import numpy as np
import torch

from mlx_mla.checkpoint import ModelFolder
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
    folder: ModelFolder, device: torch.device, dtype: InferenceDType = "float32"
) -> MLAGPT2LMHeadModel:
    """The package's own model with a folder's weights in a type; UserError if PyTorch cannot read
    it."""
    model = build_model(folder.config, folder.weights(), device)
    return model.to(getattr(torch, dtype))
