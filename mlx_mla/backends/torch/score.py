"""Scoring in PyTorch."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from mlx_mla.evaluation.scoring import HEAD_POSITIONS, RowBatch, expanded_cache
from mlx_mla.model.model_torch import MLAGPT2LMHeadModel


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
        self, prefix: np.ndarray | None, blocks: Sequence[RowBatch]
    ) -> tuple[np.ndarray, np.ndarray]:
        with expanded_cache(self.model):
            shared = None
            if prefix is not None:
                shared = DynamicCache()
                ids = _ids(prefix, self.model.device)
                self.model.transformer(ids, past_key_values=shared, use_cache=True)
            found = [self._run(shared, block) for block in blocks]
        return np.concatenate([f for f, _ in found]), np.concatenate([g for _, g in found])

    def _run(self, shared: DynamicCache | None, block: RowBatch) -> tuple[np.ndarray, np.ndarray]:
        device = self.model.device
        cache = None if shared is None else _rows(shared, _ids(block.parents, device))
        out = self.model.transformer(
            _ids(block.ids, device), past_key_values=cache, use_cache=cache is not None
        )
        hidden = out.last_hidden_state.flatten(0, 1)[_ids(block.where, device)]
        target = _ids(block.targets, device)
        logprobs, greedy = [], []
        for i in range(0, len(block.where), HEAD_POSITIONS):
            own = slice(i, i + HEAD_POSITIONS)
            logits = self.model.lm_head(hidden[own])[:, : len(self.tokenizer)].float()
            chosen = logits.gather(1, target[own, None])[:, 0] - logits.logsumexp(-1)
            logprobs.append(chosen.cpu().numpy())
            greedy.append((logits.argmax(-1) == target[own]).cpu().numpy())
        return np.concatenate(logprobs), np.concatenate(greedy)


def _rows(shared: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """Return a cache that holds these rows of a shared cache."""
    cache = copy.copy(shared)
    cache.layers = [copy.copy(layer) for layer in shared.layers]
    cache.batch_select_indices(rows)
    return cache


def _ids(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)
