"""The interface between training, decoding and scoring and a framework."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from mlx_mla.checkpoint import ModelFolder
from mlx_mla.data.windows import Batch
from mlx_mla.decoding.request import CacheChoice, CacheName, GenerationOptions
from mlx_mla.decoding.text import Piece
from mlx_mla.evaluation.scoring import Scorer
from mlx_mla.model.config import DType, InferenceDType, ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.world import SOLO, World


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step."""

    loss: float
    """Mean loss of this rank's batches before the step, in nats per token: the cross-entropy, or
    with a teacher its mixture with the divergence."""
    grad_norm: float
    """Global norm of the gradient, averaged over the ranks, before clipping."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model to distill from. `TrainConfig` holds the weight w and the temperature T.

    The loss is (1 - w) CE + w T^2 KL(teacher || student), with both softmaxes at temperature T. The
    factor T^2 keeps the size of the gradient as T changes (Hinton et al., arXiv:1503.02531).
    """

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    """float32 tensors by name."""
    vocabulary: int
    """Number of ids of the tokenizer. Padding rows beyond them are left out of both softmaxes of
    the divergence."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The state in which training begins: with initial weights, or at a checkpoint."""

    weights: Mapping[str, np.ndarray]
    """float32 tensors by name, as `parameter_shapes` lists them."""
    step: int = 0
    """Number of optimizer steps already taken."""
    optimizer_state: Mapping[str, np.ndarray] | None = None
    """Result of `TrainSession.optimizer_state`. None: a new optimizer."""
    val_loss: float | None = None
    """The last validation loss, in nats per token."""


class TrainSession(Protocol):
    """A model and its optimizer on a device."""

    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        """Take one optimizer step on the gradient averaged over the batches of all ranks.

        Args:
            step: Number of steps taken before. With the seed and the rank, it determines the
                dropout.
            learning_rate: AdamW's learning rate.
            batches: This rank's batches, all of one shape.
        """
        ...

    def loss_sum(self, batch: Batch) -> float:
        """Summed cross-entropy of a batch in nats, without dropout."""
        ...

    def is_finite(self) -> bool:
        """True if the weights and the optimizer state hold neither NaN nor infinity."""
        ...

    def weights(self) -> dict[str, np.ndarray]:
        """The float32 weights by name."""
        ...

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """The float32 moments: AdamW's as `exp_avg.NAME` and `exp_avg_sq.NAME`, Muon's as
        `momentum_buffer.NAME`."""
        ...

    def generate(self, prompt: Sequence[int], max_tokens: int, temp: float, seed: int) -> list[int]:
        """Sample a continuation with the current weights."""
        ...

    def peak_memory_bytes(self) -> int:
        """Peak memory of the framework since the session began, in bytes."""
        ...

    def scorer(self, tokenizer: Any) -> Scorer:
        """Return a scorer that uses the current weights."""
        ...


class Decoder(Protocol):
    """A loaded model that generates text."""

    tokenizer: Any
    """A transformers tokenizer."""
    vocab_size: int
    n_positions: int
    cache: CacheName
    """Kind of cache kept between tokens."""
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
        """Facts about this machine by label, for display: device, BLAS, memory limit."""
        ...

    def memory_bytes(self) -> int:
        """Bytes that a model and its training may use on the device before it swaps or fails."""
        ...

    def fused_attention(self, config: TrainConfig) -> bool:
        """True if training with a resolved configuration uses fused attention on the device, which
        stores no matrix of scores."""
        ...

    def limited_memory(self, expected: int) -> AbstractContextManager[None]:
        """Context that limits the framework's allocator for work that needs `expected` bytes."""
        ...

    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        """Measure the FLOP/s of large matrix products in a dtype.

        See `mlx_mla.backends.peak.measure_peak`. The random state does not change. Call this before
        `train_session`, which resets peak memory.
        """
        ...

    def train_session(
        self, config: TrainConfig, start: Start, teacher: Teacher | None = None, world: World = SOLO
    ) -> TrainSession:
        """Put a model and its optimizer on the device.

        Args:
            config: The resolved settings of the run.
            teacher: A model to distill from. None: train on the text only.
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
            dtype: Type of weights and computation. None: the default of `decoding_dtype`.
        """
        ...

    def scorer(self, folder: ModelFolder, dtype: InferenceDType = "float32") -> Scorer:
        """Load a model folder to score text."""
        ...


GPU_DTYPE: InferenceDType = "bfloat16"
"""Default type for decoding on GPUs."""


def decoding_dtype(asked: InferenceDType | None, device: str) -> InferenceDType:
    """Choose the type to decode in.

    Every step reads all weights, so the default is half precision on GPUs. It is float32 on CPUs,
    most of which do not compute in half precision.

    Args:
        device: Type of the backend's device: cpu; gpu (mlx); cuda or mps (torch).
    """
    return asked or ("float32" if device == "cpu" else GPU_DTYPE)


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a rank's dropout masks in a step.

    It is a function of the arguments only, so a checkpoint needs no RNG state.
    """
    return int(np.random.SeedSequence([seed, step] + ([rank] if rank else [])).generate_state(1)[0])
