"""Scoring in PyTorch."""

from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from mlx_mla.evaluation.scoring import HEAD_POSITIONS, expanded_cache
from mlx_mla.model_torch import MLAGPT2LMHeadModel


class TorchScorer:
    """Scores tokens with a model in PyTorch; see `mlx_mla.evaluation.scoring.Scorer`.

    Args:
        model: The model, on its device and in its dtype.
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, model: MLAGPT2LMHeadModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.n_positions = model.config.n_positions
        self.vocab_size = model.config.vocab_size

    @torch.inference_mode()
    def run(
        self, prefix: np.ndarray | None, ids: np.ndarray, where: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        device = self.model.device
        cache = None
        with expanded_cache(self.model):
            if prefix is not None:
                cache = DynamicCache()
                self.model.transformer(_ids(prefix, device), past_key_values=cache, use_cache=True)
                cache.batch_repeat_interleave(len(ids) // len(prefix))
            hidden, _ = self.model.transformer(
                _ids(ids, device), past_key_values=cache, use_cache=cache is not None
            )
        hidden = hidden.flatten(0, 1)[_ids(where, device)]
        target = _ids(targets, device)
        logprobs, greedy = [], []
        for i in range(0, len(where), HEAD_POSITIONS):
            own = slice(i, i + HEAD_POSITIONS)
            logits = self.model.lm_head(hidden[own])[:, : len(self.tokenizer)].float()
            chosen = logits.gather(1, target[own, None])[:, 0] - logits.logsumexp(-1)
            logprobs.append(chosen.cpu().numpy())
            greedy.append((logits.argmax(-1) == target[own]).cpu().numpy())
        return np.concatenate(logprobs), np.concatenate(greedy)


def _ids(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
