"""The PyTorch backend: the same training step, loss and decoding on MPS, CUDA or the CPU."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_mla.backend import CacheKind, DType, StepResult, Teacher, dropout_seed, stored_moment
from mlx_mla.config import TrainConfig
from mlx_mla.decode_torch import TorchDecoder, build_model, peak_memory_bytes
from mlx_mla.errors import UserError
from mlx_mla.score_torch import TorchScorer
from mlx_mla.shards import Batch
from mlx_mla.world import SOLO, World

import numpy as np
import torch
from torch.nn import functional as F


class TorchBackend:
    """Runs the model in PyTorch."""

    name = "torch"

    def __init__(self, device: str = "auto"):
        self.device = torch.device(_find_device(device))

    def train_session(
        self,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
        steps_done: int = 0,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ) -> "TorchTrainSession":
        return TorchTrainSession(self.device, config, weights, optimizer_state, steps_done, teacher, world)

    def decoder(self, folder: Path, cache: CacheKind = "latent") -> TorchDecoder:
        return TorchDecoder(folder, cache, self.device)

    def scorer(self, folder: Path, dtype: DType = "float32") -> TorchScorer:
        decoder = TorchDecoder(folder, "latent", self.device)
        return TorchScorer(decoder.model.to(getattr(torch, dtype)), decoder.tokenizer)


def _find_device(name: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device, is_there in there.items() if is_there]
    if name == "auto":
        return found[0]
    if name == "gpu" and len(found) > 1:
        return found[0]
    if name not in found:
        raise UserError(f"--device {name}: PyTorch has {', '.join(found)} here; use one of these, or auto")
    return name


class TorchTrainSession:
    """See `mlx_mla.backend.TrainSession`.

    Weights, gradients and optimiser state are float32; bfloat16 runs the forward pass under autocast.
    On CUDA the forward pass is compiled and AdamW fused; elsewhere both run as they are.
    """

    def __init__(
        self,
        device: torch.device,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None,
        steps_done: int,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ):
        self.config, self.device, self.world = config, device, world
        self.model = build_model(config.model, weights, device)
        self._teacher: Any = None
        if teacher is not None:
            self._teacher, self._vocabulary = build_model(teacher.config, teacher.weights, device), teacher.vocabulary
        self.parameters = dict(self.model.named_parameters())
        self._averaging = None if world.engine is None else world.engine.averaging(self.parameters.values())
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        others = [p for p in self.parameters.values() if p.ndim < 2]
        on_cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_epsilon,
            fused=on_cuda,
        )
        if optimizer_state is not None:
            self._load_optimizer_state(optimizer_state, steps_done)
        self._forward: Any = torch.compile(self.model) if on_cuda and config.compile else self.model
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        self.model.train()
        if self.config.model.dropout:
            torch.manual_seed(dropout_seed(self.config.seed, step, self.world.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            loss = self._training_loss(batch) / len(batches)
            last = i == len(batches) - 1
            with self._averaging.last_pass() if last and self._averaging else contextlib.nullcontext():
                loss.backward()
            total += loss.detach()
        limit = self.config.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        self.optimizer.step()
        return StepResult(total.item(), norm.item())

    def loss_sum(self, batch: Batch) -> float:
        self.model.eval()
        with torch.no_grad():
            return self._loss(batch, "sum").item()

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        tensors = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = state[moment].detach().cpu().numpy().copy()
        return tensors

    def generate(self, prompt: Sequence[int], max_tokens: int, temp: float, seed: int) -> list[int]:
        self.model.eval()
        torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self.device)
        sampling: dict[str, Any] = {"do_sample": temp > 0, "temperature": temp or None, "top_k": 0}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **sampling)
        return out[0, len(prompt) :].tolist()

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.device)

    def scorer(self, tokenizer: Any) -> TorchScorer:
        self.model.eval()
        return TorchScorer(self.model, tokenizer)

    def _loss(self, batch: Batch, reduction: str) -> torch.Tensor:
        x, y = self._tensors(batch)
        return F.cross_entropy(self._logits(self._forward, x), y, reduction=reduction)

    def _training_loss(self, batch: Batch) -> torch.Tensor:
        if self._teacher is None:
            return self._loss(batch, "mean")
        weight, temperature = self.config.teacher_weight, self.config.teacher_temperature
        assert weight is not None and temperature is not None
        x, y = self._tensors(batch)
        with torch.no_grad():
            taught = self._logits(self._teacher, x)[:, : self._vocabulary]
        logits = self._logits(self._forward, x)
        divergence = distillation_divergence(logits[:, : self._vocabulary], taught, temperature)
        return (1 - weight) * F.cross_entropy(logits, y) + weight * divergence

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (B, L) and targets (B * L,) on the device."""
        x, y = (torch.tensor(a, dtype=torch.long, device=self.device) for a in batch)
        return x, y.flatten()

    def _logits(self, forward: Any, x: torch.Tensor) -> torch.Tensor:
        """Float32 logits, (B * L, V)."""
        bfloat16 = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            logits: torch.Tensor = forward(x, use_cache=False).logits
        return logits.float().flatten(0, 1)

    def _load_optimizer_state(self, tensors: Mapping[str, np.ndarray], steps_done: int) -> None:
        for name, parameter in self.parameters.items():
            state: dict[str, Any] = {"step": torch.tensor(float(steps_done))}
            for moment in ("exp_avg", "exp_avg_sq"):
                stored = stored_moment(tensors, f"{moment}.{name}", tuple(parameter.shape))
                state[moment] = torch.tensor(stored, device=self.device)
            if self.device.type == "cuda":
                state["step"] = state["step"].to(self.device)  # where fused AdamW keeps it
            self.optimizer.state[parameter] = state


def distillation_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of the softmaxes at temperature T, mean over tokens, nats.

    Args:
        student: Logits, (N, V) float32.
        teacher: The same.
    """
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
