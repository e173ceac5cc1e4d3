"""Scoring in MLX."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_mla.backends.mlx.device import on_device
from mlx_mla.evaluation.scoring import HEAD_POSITIONS, RowBatch, expanded_cache
from mlx_mla.model.model_mlx import Model


class MLXScorer:
    """Scores tokens with a model in MLX; see `mlx_mla.evaluation.scoring.Scorer`.

    Args:
        model: The model, in its dtype.
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, device: mx.Device, model: Model, tokenizer: Any):
        self.device, self.model, self.tokenizer = device, model, tokenizer
        self.n_positions = model.args.n_positions
        self.vocab_size = model.args.vocab_size

    @on_device
    def run(
        self, prefix: np.ndarray | None, blocks: Sequence[RowBatch]
    ) -> tuple[np.ndarray, np.ndarray]:
        with expanded_cache(self.model):
            shared = None
            if prefix is not None:
                shared = make_prompt_cache(self.model)
                self.model.transformer(mx.array(prefix), shared)
            found = [self._run(shared, block) for block in blocks]
        return np.concatenate([f for f, _ in found]), np.concatenate([g for _, g in found])

    def _run(self, shared: list[Any] | None, block: RowBatch) -> tuple[np.ndarray, np.ndarray]:
        cache = None if shared is None else self._rows(shared, mx.array(block.parents))
        hidden = self.model.transformer(mx.array(block.ids), cache)
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(block.where)]
        logprobs, greedy = [], []
        for i in range(0, len(block.where), HEAD_POSITIONS):
            own = slice(i, i + HEAD_POSITIONS)
            logits = self.model.head(hidden[own])[:, : len(self.tokenizer)].astype(mx.float32)
            target = mx.array(block.targets[own])
            chosen = mx.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - mx.logsumexp(
                logits, axis=-1
            )
            best = mx.argmax(logits, axis=-1) == target
            mx.eval(chosen, best)
            logprobs.append(np.array(chosen))
            greedy.append(np.array(best))
        return np.concatenate(logprobs), np.concatenate(greedy)

    def _rows(self, shared: list[Any], rows: mx.array) -> list[Any]:
        """Return a cache that holds these rows of a shared cache."""
        cache = make_prompt_cache(self.model)
        for one, many in zip(shared, cache):
            many.update_and_fetch(*(a[..., : one.offset, :][rows] for a in (one.keys, one.values)))
        return cache
