"""What a benchmark times: one model in one framework, behind one small interface; and what a call
of it must compute, from shapes alone."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_mla import checkpoint, files
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.estimate import BYTES, forward_flops_per_token, matrix_values
from mlx_mla.model.train_config import TrainConfig

Weights = dict[str, np.ndarray]


def seconds(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a call returns that times only a part of what it does.

    Attributes:
        seconds: Of that part.
        cache_bytes: What the decoding cache holds, with the room it keeps for tokens to come.
        waited: Seconds of the same steps, each waited for before Python describes the next one;
            None where `seconds` is that already.
    """

    seconds: float
    cache_bytes: int | None = None
    waited: float | None = None


class Memory(Protocol):
    """Memory that a framework has allocated since a subject began to be loaded."""

    def reset(self) -> None:
        """Forget the peak so far."""
        ...

    def peak(self) -> int | None:
        """Most bytes held since the last reset; None where the framework does not report it."""
        ...


class Subject:
    """A model ready to be timed. Every timed call returns only when the device has finished."""

    backend: str

    def __init__(self, model: str, network: Any, config: ModelConfig, memory: Memory):
        self.model, self.network, self.config, self.memory = model, network, config, memory

    def use(self, kind: str) -> None:
        """Choose what the network caches, if it has a choice."""
        if hasattr(self.network, "materialize_cache"):
            self.network.materialize_cache(kind == "materialized")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, vocab_size) in float32 for ids (B, T), for the parity gate."""
        raise NotImplementedError

    def forward(self, ids: np.ndarray) -> None:
        """One forward pass over ids (B, T), logits of every position, no cache."""
        raise NotImplementedError

    def first_token(self, ids: np.ndarray, kind: str) -> None:
        """Read a prompt (T,) into a new cache and choose the next token."""
        raise NotImplementedError

    def decode(self, batch: int, context: int, steps: int, kind: str) -> Timed:
        """`steps` greedy steps after a context that is in the cache, by the loop that `generate`
        has in this framework; kind "none" reads the whole context again for every token. The peak
        of memory is of the steps, without filling the cache."""
        raise NotImplementedError

    def read_on(self, batch: int, context: int, new: int) -> Timed:
        """One call with `new` tokens after a context that is in the latent cache, logits of them
        all."""
        raise NotImplementedError


class Trainer:
    """A training session ready to be timed.

    Attributes:
        session: A `TrainSession`, or another loop with its `step`.
        memory: Made before the session.
    """

    def __init__(self, config: TrainConfig, session: Any, memory: Memory):
        self.config, self.session, self.memory = config, session, memory
        self._stepped = False

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        """One optimizer step on inputs and targets (B, T)."""
        self.session.step(0, 1e-4, [(x, y)])
        self._stepped = True

    def save(self) -> Timed:
        """Write a training checkpoint: weights, optimizer state, checksums, sync, rename."""

        def write() -> None:
            with files.atomic_folder(target / "step-1") as folder:
                checkpoint.write_model(
                    folder, self.config.model, self.session.weights(), tokenizer, ""
                )
                checkpoint.write_train_state(folder, self.session.optimizer_state(), {"step": 1})

        if not self._stepped:  # before it the optimizer has no state
            ids = np.zeros((1, 8), np.int32)
            self.step(ids, ids)
        tokenizer = ByteTokenizer().fast_tokenizer()
        with tempfile.TemporaryDirectory(dir=".") as temporary:
            target = Path(temporary)
            return Timed(seconds(write))


def gpt2_shape(config: ModelConfig) -> dict[str, Any]:
    """Arguments of GPT-2's own configuration classes."""
    names = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "layer_norm_epsilon")
    return {name: getattr(config, name) for name in names} | {"n_ctx": config.n_positions}


def cache_bytes(config: ModelConfig, kind: str, dtype: str) -> int:
    """Bytes of the decoding cache per token of context, all layers."""
    if kind == "none":
        return 0
    return config.attention_spec.cached_values(materialized=kind == "materialized") * BYTES[dtype]


def call_flops(
    measure: str, config: ModelConfig, kind: str | None, batch: int, context: int, steps: int = 1
) -> float:
    """FLOPs of a call of a measure on sequences of `context` tokens, cached ones in decoding; 0
    where they are not counted."""
    forward = float(context * forward_flops_per_token(config, context)) if context else 0.0
    if measure == "decoding" and kind != "none":
        scores = config.attention_spec.score_flops(on_latents=kind == "latent") * context
        return batch * steps * (2.0 * matrix_values(config) + scores)
    if measure == "first token":  # the head's product is needed for the last position alone
        assert config.vocab_size
        return batch * (forward - (context - 1) * 2.0 * config.vocab_size * config.n_embd)
    return batch * forward * {"forward": 1, "decoding": steps, "training": 3}.get(measure, 0)
