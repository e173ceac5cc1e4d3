"""The subjects of the benchmarks, by framework.

The frameworks are in mlx.py and torch.py, imported only when they are asked for.
"""

import gc
from typing import Any

from bench.subjects.contract import Subject, Trainer, Weights
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig, TrainConfig


def load(
    backend: str, model: str, config: ModelConfig, weights: Weights, dtype: str, device: str
) -> Subject:
    """One of this project's models in a backend."""
    return _module(backend).ours(model, config, weights, dtype, device)


def load_reference(
    backend: str, config: ModelConfig, weights: Weights, dtype: str, device: str
) -> Subject:
    """GPT-2 of the ecosystem with the weights of our MHA model: mlx-lm's, or transformers'."""
    assert not config.beyond_gpt2
    return _module(backend).reference(config, weights, dtype, device)


def load_trainer(backend: str, config: TrainConfig, device: str) -> Trainer:
    """A training session of this project on random weights."""
    return _module(backend).Trainer(config, device)


def rates(backend: str, dtype: str, device: str, side: int) -> tuple[float, float]:
    """What the device does at best in this framework: matmul FLOP/s, and bytes per second from
    memory, by `side` squared values, which should not fit into its caches."""
    module = _module(backend)
    return module.rates(dtype, side) if backend == "mlx" else module.rates(dtype, device, side)


def release(backend: str) -> None:
    """Give back what subjects of a backend held that nothing refers to any more."""
    gc.collect()
    _module(backend).release()


def _module(backend: str) -> Any:
    try:
        if backend == "mlx":
            from bench.subjects import mlx

            return mlx
        from bench.subjects import torch

        return torch
    except ModuleNotFoundError as e:
        raise UserError(
            f"backend {backend}: {e.name} is not installed; pip install {e.name}"
        ) from None
