"""What compare_backends times: one model in one framework, behind one small interface.

The frameworks are in subject_mlx.py and subject_torch.py, imported only when they are asked for.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.errors import UserError
from mlx_mla.estimate import BYTES
from mlx_mla.weights import num_parameters, parameter_shapes

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


def load(
    backend: str, model: str, config: ModelConfig, weights: Weights, dtype: str, device: str
) -> Subject:
    """One of this project's models in a backend."""
    return _module(backend).ours(model, config, weights, dtype, device)


def load_reference(
    backend: str, config: ModelConfig, weights: Weights, dtype: str, device: str
) -> Subject:
    """GPT-2 of the ecosystem with the weights of our MHA model: mlx-lm's, or transformers'."""
    assert not config.kind.beyond_gpt2
    return _module(backend).reference(config, weights, dtype, device)


def rates(backend: str, dtype: str, device: str) -> tuple[float, float]:
    """What the device does at best in this framework: matmul FLOP/s, and bytes per second from
    memory."""
    module = _module(backend)
    return module.rates(dtype) if backend == "mlx" else module.rates(dtype, device)


def _module(backend: str) -> Any:
    try:
        if backend == "mlx":
            from bench import subject_mlx

            return subject_mlx
        from bench import subject_torch

        return subject_torch
    except ModuleNotFoundError as e:
        raise UserError(
            f"backend {backend}: {e.name} is not installed; pip install {e.name}"
        ) from None


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


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights in the compute type."""
    return num_parameters(config) * BYTES[dtype]


def cache_bytes(config: ModelConfig, kind: str, dtype: str) -> int:
    """Bytes of the decoding cache per token of context, all layers."""
    if kind == "none":
        return 0
    return config.kind.cached_values(materialized=kind == "materialized") * BYTES[dtype]


def decode_flops(config: ModelConfig, kind: str, context: int) -> float:
    """FLOPs of decoding one token after `context` cached ones; without a cache see
    forward_flops_per_token."""
    c = config
    matrices = sum(
        s[0] * s[1] for n, s in parameter_shapes(c).items() if len(s) == 2 and "wpe" not in n
    )
    return 2.0 * matrices + c.kind.score_flops(on_latents=kind == "latent") * context
