"""What a benchmark times: one model in one framework, behind one small interface."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mlx_mla.config import ModelConfig, TrainConfig

Weights = dict[str, np.ndarray]


class Subject(Protocol):
    """A model ready to be timed. Every timed call returns only when the device has finished."""

    model: str
    backend: str
    config: ModelConfig
    device_kind: str
    """As `choose_cache` knows it: cpu; gpu (MLX), cuda or mps (PyTorch)."""

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, vocab_size) in float32, for the parity gate."""
        ...

    def forward(self, ids: np.ndarray) -> None:
        """One forward pass over ids (B, T), logits of every position, no cache."""
        ...

    def first_token(self, ids: np.ndarray, kind: str) -> None:
        """Read a prompt (T,) into a new cache and choose the next token."""
        ...

    def decode(self, batch: int, context: int, steps: int, kind: str) -> tuple[float, int]:
        """Seconds of `steps` greedy steps after a context that is in the cache, and the cache's
        bytes."""
        ...

    def read_on(self, batch: int, context: int, new: int) -> float:
        """Seconds of one call with `new` tokens after a context that is in the latent cache, logits
        of them all."""
        ...

    def train_step(self, config: TrainConfig) -> Callable[[np.ndarray, np.ndarray], None]:
        """A function that takes one optimiser step on (inputs, targets)."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Most bytes held since the last call; None where the framework does not say."""
        ...


def gpt2_shape(config: ModelConfig) -> dict[str, Any]:
    """Arguments of GPT-2's own configuration classes."""
    return {
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
    }
