"""What the trainer and the commands ask of a framework, and how they get one by name."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Optional, Protocol

from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.errors import UserError
from mlx_mla.scoring import Scorer
from mlx_mla.shards import Batch
from mlx_mla.world import SOLO, World

import numpy as np

DType = Literal["float32", "bfloat16"]
CacheKind = Literal["latent", "materialized", "auto", "none"]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Outcome of one optimiser step."""

    loss: float
    """Mean loss of this rank's batches before the step, in nats per token: cross-entropy, with a teacher mixed with
    the divergence."""
    grad_norm: float
    """Global norm of the gradient, averaged over the ranks, before clipping."""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model to distil from; `TrainConfig` has the weight and the temperature.

    The loss is (1 - w) CE + w T^2 KL(teacher || student), both softmaxes at temperature T (Hinton et al.,
    arXiv:1503.02531, whose T^2 keeps the gradient's size as T changes).
    """

    config: ModelConfig
    weights: Mapping[str, np.ndarray]
    """float32 tensors by name."""
    vocabulary: int
    """Token ids of the tokenizer; rows of padding past them are in neither softmax of the divergence."""


class TrainSession(Protocol):
    """A model and its optimiser on a device."""

    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        """Take one optimiser step on the mean gradient of `batches`, which have one shape, of all ranks.

        Args:
            step: Number of steps taken before; with the seed and the rank it decides the dropout.
        """
        ...

    def loss_sum(self, batch: Batch) -> float:
        """Summed cross-entropy of a batch in nats, without dropout."""
        ...

    def weights(self) -> dict[str, np.ndarray]:
        """The float32 weights by name."""
        ...

    def optimizer_state(self) -> dict[str, np.ndarray]:
        """AdamW's moments as `exp_avg.NAME` and `exp_avg_sq.NAME`, Muon's as `momentum_buffer.NAME`, float32."""
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


@dataclasses.dataclass(kw_only=True)
class GenerationOptions:
    """How to continue a prompt."""

    max_tokens: Optional[int] = None
    """Most tokens to generate for each prompt. None: 200, or as many as fit in n_positions."""
    temp: float = 0.8
    """Sampling temperature. 0: greedy, always the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens. 0: off."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability. 1: off."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the likeliest one's probability. 0: off."""
    repetition_penalty: float = 1.0
    """Divide the scores of recent tokens by this. 1: off."""
    repetition_context_size: int = 64
    """Tokens that count as recent for --repetition-penalty."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not printed."""
    cache: CacheKind = "latent"
    """What is kept between tokens: the latents, expanded keys and values, the faster of these two by the cost
    model in docs/decoding.md (auto), or nothing (all is recomputed)."""
    kv_bits: Optional[Literal[4, 8]] = None
    """Quantise the cache to so many bits. None: off."""
    prompt_cache: Optional[Path] = None
    """Go on from the context in this .safetensors file of --save-prompt-cache; the prompt is what follows it."""
    save_prompt_cache: Optional[Path] = None
    """Write the context, with what was generated, to this .safetensors file."""
    draft_model: Optional[str] = None
    """A small model with the same tokenizer that guesses tokens for the model to check, several at a time: run
    folder, model folder or hub id. The greedy text stays the same."""
    num_draft_tokens: int = 3
    """Tokens that --draft-model guesses at a time."""
    max_kv_size: Optional[int] = None
    """Go on past this many tokens of context (at most n_positions) by dropping all but the newest half
    and reading it again. None: a context past n_positions is an error."""


@dataclasses.dataclass
class Piece:
    """A bit of generated text, with the figures so far."""

    text: str
    token_ids: list[int]
    """The tokens since the last piece."""
    figures: dict[str, Any]
    """prompt_tokens, prompt_tps, generation_tps, ttft_ms, kv_cache_bytes, peak_memory_bytes; with a draft model
    also accepted_draft_tokens."""
    finish_reason: Optional[str] = None
    """"stop" or "length" on the last piece, else None."""


class Decoder(Protocol):
    """A loaded model that generates."""

    tokenizer: Any
    """A transformers tokenizer."""
    vocab_size: int
    n_positions: int
    cache: CacheKind
    """What is kept between tokens; where "auto" was asked for, what it chose for the last request."""

    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Piece]:
        """Continue one prompt (token ids), piece by piece."""
        ...

    def batch(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> Iterator[tuple[int, Piece]]:
        """Continue several prompts together; yields (index of the prompt, piece)."""
        ...


class Backend(Protocol):
    """A framework that can run the model."""

    name: str

    def memory_bytes(self) -> int:
        """Bytes that a model and its training may take on the device before it swaps or fails."""
        ...

    @property
    def fused_attention(self) -> bool:
        """Whether the device's attention keeps no matrix of scores."""
        ...

    def limited_memory(self, expected: int) -> AbstractContextManager[None]:
        """Holds the framework's allocator to what work that needs `expected` bytes can do with."""
        ...

    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        """FLOP/s of large matrix products in a dtype, measured now; see `mlx_mla.peak.measure_peak`.

        Leaves the random state as it is. Comes before `train_session`, which sets peak memory back.
        """
        ...

    def train_session(
        self,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
        steps_done: int = 0,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ) -> TrainSession:
        """Put a model and its optimiser on the device.

        Args:
            weights: float32 tensors by name, as `parameter_shapes` lists them.
            optimizer_state: What `TrainSession.optimizer_state` gave; None to start anew.
            steps_done: Optimiser steps behind that state.
            teacher: A model to distil from; None to train on the text alone.
            world: The ranks over which gradients are averaged.
        """
        ...

    def decoder(self, folder: Path, cache: CacheKind = "latent") -> Decoder:
        """Load a model folder for generation."""
        ...

    def scorer(self, folder: Path, dtype: DType = "float32") -> Scorer:
        """Load a model folder to score text with."""
        ...


def dropout_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of a rank's dropout masks of a step: a function of these alone, so resuming needs no RNG state on disk."""
    return int(np.random.SeedSequence([seed, step] + ([rank] if rank else [])).generate_state(1)[0])


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix of a block, which --optimizer muon orthogonalises: not an embedding."""
    return ndim == 2 and ".h." in name


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def muon_rate(config: TrainConfig, rate: float) -> float:
    """Muon's learning rate where AdamW's is `rate`: both follow one schedule."""
    assert config.muon_learning_rate
    return rate * config.muon_learning_rate / config.learning_rate


def stored_moment(tensors: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor of a checkpoint's optimiser state; UserError if it is missing or of another shape."""
    stored = tensors.get(key)
    if stored is None or stored.shape != shape:
        name = key.partition(".")[2]
        raise UserError(f"the checkpoint's optimiser state does not fit the model at {name}")
    return stored


BackendName = Literal["mlx", "torch"]
DeviceName = Literal["auto", "cpu", "gpu", "mps", "cuda"]


def get_backend(name: BackendName, device: DeviceName = "auto") -> Backend:
    """The backend by its command-line name, on a device; imports its framework.

    Raises:
        UserError: If the framework is not installed, or the device is not there.
    """
    try:
        if name == "torch":
            from mlx_mla.backend_torch import TorchBackend

            return TorchBackend(device)
        from mlx_mla.backend_mlx import MLXBackend

        return MLXBackend(device)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in ("torch", "mlx", "mlx_lm"):
            raise
        raise UserError(f"--backend {name}: {e.name} is not installed; pip install {e.name}") from None
