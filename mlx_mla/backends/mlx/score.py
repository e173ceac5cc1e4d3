"""Scoring in MLX."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_mla.backends.mlx.device import on_device
from mlx_mla.evaluation.scoring import HEAD_POSITIONS, expanded_cache
from mlx_mla.model_mlx import Model


class MLXScorer:
    """Scores tokens with a model in MLX; see `mlx_mla.evaluation.scoring.Scorer`.

    Args:
        device: Where to run.
        model: The model, in its dtype.
        tokenizer: A transformers tokenizer.
    """

    def __init__(self, device: mx.Device, model: Model, tokenizer: Any):
        self.device, self.model, self.tokenizer = device, model, tokenizer
        self.n_positions = model.args.n_positions
        self.vocab_size = model.args.vocab_size

    @on_device
    def run(
        self, prefix: np.ndarray | None, ids: np.ndarray, where: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        with expanded_cache(self.model):
            cache = None if prefix is None else self._repeated(prefix, len(ids) // len(prefix))
            hidden = self.model.transformer(mx.array(ids), cache)
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(where)]
        logprobs, greedy = [], []
        for i in range(0, len(where), HEAD_POSITIONS):
            own = slice(i, i + HEAD_POSITIONS)
            logits = self.model.head(hidden[own])[:, : len(self.tokenizer)].astype(mx.float32)
            target = mx.array(targets[own])
            chosen = mx.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - mx.logsumexp(
                logits, axis=-1
            )
            best = mx.argmax(logits, axis=-1) == target
            mx.eval(chosen, best)
            logprobs.append(np.array(chosen))
            greedy.append(np.array(best))
        return np.concatenate(logprobs), np.concatenate(greedy)

    def _repeated(self, prefix: np.ndarray, times: int) -> list[Any]:
        """A cache that holds each row of the prefix so many times."""
        shared, cache = make_prompt_cache(self.model), make_prompt_cache(self.model)
        self.model.transformer(mx.array(prefix), shared)
        for one, many in zip(shared, cache):
            repeated = (
                mx.repeat(a[..., : one.offset, :], times, 0) for a in (one.keys, one.values)
            )
            many.update_and_fetch(*repeated)
        return cache
