"""The PyTorch backend: the same training step, loss and decoding on MPS, CUDA or the CPU."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_mla.backend import CacheKind, DType, StepResult, Teacher, dropout_seed, physical_memory
from mlx_mla.config import TrainConfig
from mlx_mla.decode_torch import TorchDecoder, build_model, peak_memory_bytes
from mlx_mla.errors import UserError
from mlx_mla.loss_torch import head_loss, hidden_states
from mlx_mla.optim_torch import Optimizers
from mlx_mla.peak import measure_peak
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

    def memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        return torch.mps.recommended_max_memory() if self.device.type == "mps" else physical_memory()

    @property
    def fused_attention(self) -> bool:
        return self.device.type != "mps"

    def limited_memory(self, expected: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # PyTorch takes memory as it computes

    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        def product(n: int) -> Callable[[], None]:
            random = torch.Generator(self.device).manual_seed(0)
            like: dict[str, Any] = {"device": self.device, "dtype": getattr(torch, dtype), "generator": random}
            a, b = (torch.randn(n, n, **like) for _ in range(2))

            def multiply() -> None:
                a @ b
                if self.device.type != "cpu":
                    getattr(torch, self.device.type).synchronize()

            return multiply

        return measure_peak(product, seconds)

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
        self.optimizers = Optimizers(config, self.parameters)
        if optimizer_state is not None:
            self.optimizers.load_state(optimizer_state, steps_done)
        on_cuda = device.type == "cuda"
        self._hidden: Any = torch.compile(hidden_states) if on_cuda and config.compile else hidden_states
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        self.model.train()
        if self.config.model.dropout:
            torch.manual_seed(dropout_seed(self.config.seed, step, self.world.rank))
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            loss = self._training_loss(batch) / len(batches)
            last = i == len(batches) - 1
            with self._averaging.last_pass() if last and self._averaging else contextlib.nullcontext():
                loss.backward()
            total += loss.detach()
        limit = self.config.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        self.optimizers.step(learning_rate)
        return StepResult(total.item(), norm.item())

    def loss_sum(self, batch: Batch) -> float:
        self.model.eval()
        with torch.no_grad():
            return self._cross_entropy(*self._tensors(batch)).item()

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return self.optimizers.state_tensors()

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

    def _training_loss(self, batch: Batch) -> torch.Tensor:
        x, y = self._tensors(batch)
        if self._teacher is None:
            return self._cross_entropy(x, y) / len(y)
        weight, temperature = self.config.teacher_weight, self.config.teacher_temperature
        assert weight is not None and temperature is not None
        with torch.no_grad(), self._autocast():
            taught = self._teacher(x, use_cache=False).logits[..., : self._vocabulary].float().flatten(0, 1)
        with self._autocast():
            logits = self.model.lm_head(self._last_hidden(x)).float().flatten(0, 1)
        divergence = distillation_divergence(logits[:, : self._vocabulary], taught, temperature)
        return (1 - weight) * F.cross_entropy(logits, y) + weight * divergence

    def _cross_entropy(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Summed over all tokens."""
        with self._autocast():
            return head_loss(self._last_hidden(x), self.model.lm_head.weight, y, self.config.loss_chunk or 0)

    def _last_hidden(self, x: torch.Tensor) -> torch.Tensor:
        every = self.config.checkpoint_every if self.model.training else 0
        h: torch.Tensor = self._hidden(self.model.transformer, x, every)
        return h

    def _autocast(self) -> contextlib.AbstractContextManager:
        bfloat16 = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (B, L) and targets (B * L,) on the device."""
        x, y = (torch.tensor(a, dtype=torch.long, device=self.device) for a in batch)
        return x, y.flatten()


def distillation_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) of the softmaxes at temperature T, mean over tokens, nats.

    Args:
        student: Logits, (N, V) float32.
        teacher: The same.
    """
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
