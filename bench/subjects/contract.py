"""What a benchmark times: one model in one framework, behind one small interface."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from mlx_mla.model.config import ModelConfig

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a call says that times only a part of what it does.

    Attributes:
        seconds: Of that part.
        cache_bytes: What the decoding cache holds, with the room it keeps for tokens to come.
        waited: Seconds of the same steps where each is waited for before Python describes the next
            one; None where that is what `seconds` says.
    """

    seconds: float
    cache_bytes: int | None = None
    waited: float | None = None


class Memory(Protocol):
    """Memory of a framework since one subject began to be loaded, without what was there before."""

    def reset(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int | None:
        """Most bytes held since the last reset; None where the framework does not say."""
        ...


class Subject(Protocol):
    """A model ready to be timed. Every timed call returns only when the device has finished."""

    model: str
    backend: str
    config: ModelConfig
    memory: Memory
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

    def decode(self, batch: int, context: int, steps: int, kind: str) -> Timed:
        """`steps` greedy steps after a context that is in the cache, by the loop that `generate`
        has in this framework. The peak of memory is of the steps, without filling the cache."""
        ...

    def read_on(self, batch: int, context: int, new: int) -> Timed:
        """One call with `new` tokens after a context that is in the latent cache, logits of them
        all."""
        ...


class Trainer(Protocol):
    """A training session ready to be timed."""

    memory: Memory

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """One optimiser step on inputs and targets (B, T)."""
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
