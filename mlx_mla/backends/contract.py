"""What training, decoding and scoring ask of a framework."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Optional, Protocol

import numpy as np

from mlx_mla.checkpoint import ModelFolder
from mlx_mla.data.windows import Batch
from mlx_mla.decoding.request import CacheChoice, CacheName, GenerationOptions
from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Scorer
from mlx_mla.model.config import DType, InferenceDType, ModelConfig, TrainConfig
from mlx_mla.world import SOLO, World


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Outcome of one optimiser step."""

    loss: float
    """Mean loss of this rank's batches before the step, in nats per token: cross-entropy, with a
    teacher mixed with the divergence."""
    grad_norm: float
    """Global norm of the gradient, averaged over the ranks, before clipping."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model to distil from; `TrainConfig` has the weight and the temperature.

    The loss is (1 - w) CE + w T^2 KL(teacher || student), both softmaxes at temperature T (Hinton
    et al., arXiv:1503.02531, whose T^2 keeps the gradient's size as T changes).
    """

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    """float32 tensors by name."""
    vocabulary: int
    """Token ids of the tokenizer; rows of padding past them are in neither softmax of the
    divergence."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where training begins: with first weights, or at a checkpoint."""

    weights: Mapping[str, np.ndarray]
    """float32 tensors by name, as `parameter_shapes` lists them."""
    step: int = 0
    """Optimiser steps behind them."""
    optimizer_state: Mapping[str, np.ndarray] | None = None
    """What `TrainSession.optimizer_state` gave; None to start anew."""
    val_loss: float | None = None
    """The last validation loss, nats per token."""


class TrainSession(Protocol):
    """A model and its optimiser on a device."""

    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        """Take one optimiser step on the mean gradient of `batches`, which have one shape, of all
        ranks.

        Args:
            step: Number of steps taken before; with the seed and the rank it decides the dropout.
        """
        ...

    def loss_sum(self, batch: Batch) -> float:
        """Summed cross-entropy of a batch in nats, without dropout."""
        ...

    def is_finite(self) -> bool:
        """Whether the weights and the optimiser's state hold no NaN and no infinity."""
        ...

    def weights(self) -> dict[str, np.ndarray]:
        """The float32 weights by name."""
        ...

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """AdamW's moments as `exp_avg.NAME` and `exp_avg_sq.NAME`, Muon's as
        `momentum_buffer.NAME`, float32."""
        ...

    def generate(self, prompt: Sequence[int], max_tokens: int, temp: float, seed: int) -> list[int]:
        """Sample a continuation with the weights as they are."""
        ...

    def peak_memory_bytes(self) -> int:
        """Most bytes the framework has held at once since the session began."""
        ...

    def scorer(self, tokenizer: Any) -> Scorer:
        """Scores text with the weights as they are."""
        ...


@dataclasses.dataclass
class Piece:
    """A bit of generated text, with the figures so far."""

    text: str
    token_ids: list[int]
    """The tokens since the last piece."""
    figures: dict[str, Any]
    """prompt_tokens, prompt_tps, generation_tps, ttft_ms, kv_cache_bytes, peak_memory_bytes; with a
    draft model also accepted_draft_tokens."""
    finish_reason: Optional[str] = None
    """"stop" or "length" on the last piece, else None."""


class Decoder(Protocol):
    """A loaded model that generates."""

    tokenizer: Any
    """A transformers tokenizer."""
    vocab_size: int
    n_positions: int
    cache: CacheName
    """What is kept between tokens."""
    dtype: InferenceDType
    """Type of the weights, the computation and the cache."""

    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Piece]:
        """Continue one prompt (token ids), piece by piece."""
        ...

    def batch(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> Iterator[tuple[int, Piece]]:
        """Continue several prompts together; yields (index of the prompt, piece)."""
        ...


class Backend(Protocol):
    """A framework that can run the model."""

    name: str

    def device_info(self) -> dict[str, str]:
        """What the framework found on this machine, by labels for people: device, BLAS, memory
        limit."""
        ...

    def memory_bytes(self) -> int:
        """Bytes that a model and its training may take on the device before it swaps or fails."""
        ...

    def fused_attention(self, config: TrainConfig) -> bool:
        """Whether training with a resolved configuration keeps no matrix of scores on the
        device."""
        ...

    def limited_memory(self, expected: int) -> AbstractContextManager[None]:
        """Holds the framework's allocator to what work that needs `expected` bytes can do with."""
        ...

    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        """FLOP/s of large matrix products in a dtype, measured now; see
        `mlx_mla.backends.peak.measure_peak`.

        Leaves the random state as it is. Comes before `train_session`, which sets peak memory back.
        """
        ...

    def train_session(
        self, config: TrainConfig, start: Start, teacher: Teacher | None = None, world: World = SOLO
    ) -> TrainSession:
        """Put a model and its optimiser on the device.

        Args:
            teacher: A model to distil from; None to train on the text alone.
            world: The ranks over which gradients are averaged.
        """
        ...

    def decoder(
        self,
        folder: ModelFolder,
        cache: CacheChoice = "latent",
        dtype: InferenceDType | None = None,
    ) -> Decoder:
        """Load a model folder for generation.

        Args:
            dtype: Type of weights and computation; None: `decoding_dtype`'s.
        """
        ...

    def scorer(self, folder: ModelFolder, dtype: InferenceDType = "float32") -> Scorer:
        """Load a model folder to score text with."""
        ...


GPU_DTYPE: InferenceDType = "bfloat16"
"""Type in which GPUs decode where none is asked for."""


def decoding_dtype(asked: InferenceDType | None, device: str) -> InferenceDType:
    """The type to decode in: what was asked for; else, since a step reads every weight, the short
    one where the device computes in it, and float32 on a CPU, which mostly does not.

    Args:
        device: The backend's kind of device: cpu; gpu (mlx), cuda or mps (torch).
    """
    return asked or ("float32" if device == "cpu" else GPU_DTYPE)


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a rank's dropout masks of a step: a function of these alone, so resuming needs no RNG
    state on disk."""
    return int(np.random.SeedSequence([seed, step] + ([rank] if rank else [])).generate_state(1)[0])


def stored_moment(
    tensors: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...]
) -> np.ndarray:
    """One tensor of a checkpoint's optimiser state; UserError if another optimiser wrote it."""
    stored = tensors.get(key)
    if stored is None or stored.shape != shape:
        found = "is missing" if stored is None else f"has shape {stored.shape}"
        raise UserError(
            f"the checkpoint's optimiser state does not fit the model: tensor {key} {found}, and "
            f"the model needs {shape}; start a new run with --init"
        )
    return stored
