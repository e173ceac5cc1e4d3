"""A plain PyTorch training loop, as nanoGPT's and many others' are, to compare this project's
sessions with."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bench.subjects.torch import reference_network
from mlx_mla.backends.contract import Start
from mlx_mla.backends.torch.backend import TorchBackend
from mlx_mla.backends.torch.load import build_model
from mlx_mla.model.config import TrainConfig
from mlx_mla.model.weights import initial_weights

Step = Callable[[np.ndarray, np.ndarray], None]
"""Takes one optimiser step on inputs and targets (B, T)."""


def plain_step(config: TrainConfig) -> Step:
    """All logits at once, F.cross_entropy, clipping, torch.optim.AdamW; compiled and fused on CUDA.

    The network is transformers' GPT-2 where the attention is GPT-2's, else this project's.
    """
    device = _device(config)
    weights = initial_weights(config.model, 0)
    network: Any
    if not config.model.beyond_gpt2:
        network = reference_network(config.model, weights).to(device)
    else:
        network = build_model(config.model, weights, device)
    network.train()
    matrices, others = (
        [p for p in network.parameters() if (p.ndim >= 2) == is_matrix]
        for is_matrix in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=1e-4,
        betas=(config.beta1, config.beta2),
        fused=device.type == "cuda",
    )
    forward = torch.compile(network) if device.type == "cuda" else network
    half = config.dtype == "bfloat16"

    def step(x: np.ndarray, y: np.ndarray) -> None:
        ids, targets = (torch.tensor(a, dtype=torch.long, device=device) for a in (x, y))
        with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
            logits = forward(ids, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def our_step(config: TrainConfig) -> Step:
    """The step of this project's PyTorch session."""
    session = TorchBackend(config.device).train_session(
        config, Start(initial_weights(config.model, 0))
    )

    def step(x: np.ndarray, y: np.ndarray) -> None:
        session.step(0, 1e-4, [(x, y)])

    return step


def rate(step: Step, x: np.ndarray, y: np.ndarray) -> float:
    """Tokens per second of one step, which comes back when the device has finished."""
    began = time.perf_counter()
    step(x, y)
    return x.size / (time.perf_counter() - began)


def _device(config: TrainConfig) -> torch.device:
    return TorchBackend(config.device).device
