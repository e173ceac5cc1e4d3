"""Training in PyTorch: a model, its optimizer and the step."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mlx_mla.backends.contract import Start, StepResult, Teacher, dropout_seed
from mlx_mla.backends.torch.device import peak_memory_bytes
from mlx_mla.backends.torch.load import build_model
from mlx_mla.backends.torch.loss import head_loss, hidden_states
from mlx_mla.backends.torch.optim import Optimizers
from mlx_mla.backends.torch.score import TorchScorer
from mlx_mla.data.windows import Batch
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import is_trained
from mlx_mla.world import SOLO, World


class TorchTrainSession:
    """See `mlx_mla.backends.contract.TrainSession`.

    Weights, gradients and optimizer state are float32. With bfloat16, the forward pass runs under
    autocast. On CUDA, the forward pass is compiled, and so is the loss unless it is chunked. AdamW
    is fused on CUDA and MPS.
    """

    def __init__(
        self,
        device: torch.device,
        config: TrainConfig,
        start: Start,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ):
        self.config, self.device, self.world = config, device, world
        self.model = build_model(config.model, start.weights, device)
        self._teacher: Any = None
        if teacher is not None:
            self._teacher = build_model(teacher.config, teacher.weights, device)
            self._vocabulary = teacher.vocabulary
        for name, p in self.model.named_parameters():
            p.requires_grad_(is_trained(name, config.trainable))
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._average = world.gradient_average(self.parameters.values())
        self.optimizers = Optimizers(config, self.parameters)
        if start.optimizer_state is not None:
            self.optimizers.load_state(start.optimizer_state, start.step)
        on_cuda = device.type == "cuda"
        jit: Any = torch.compile if on_cuda and config.compile else lambda f: f
        self._hidden: Callable[..., torch.Tensor] = jit(hidden_states)
        # In eager mode, every operation of the loss writes all logits again; in chunks, they are
        # few.
        self._head_loss: Callable[..., torch.Tensor] = (
            head_loss if config.loss_chunk else jit(head_loss)
        )
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
            with self._average.last_pass() if last else contextlib.nullcontext():
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

    def is_finite(self) -> bool:
        tensors = [*self.parameters.values(), *self.optimizers.moments().values()]
        # Sums need no memory and a tenth of the time. If one is not finite, it may have overflowed.
        with torch.no_grad():
            sums = torch.stack([t.sum() for t in tensors]).isfinite().tolist()
            return all(ok or bool(t.isfinite().all()) for ok, t in zip(sums, tensors))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return self.optimizers.state_tensors()

    def generate(self, prompt: Sequence[int], max_tokens: int, temp: float, seed: int) -> list[int]:
        self.model.eval()
        torch.manual_seed(seed)
        ids = torch.tensor([list(prompt)], device=self.device)
        sampling: dict[str, Any] = {"do_sample": temp > 0, "temperature": temp or None, "top_k": 0}
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **sampling
        )
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
            taught = self._teacher(x, use_cache=False).logits[..., : self._vocabulary]
        with self._autocast():
            logits = self.model.lm_head(self._last_hidden(x)).float().flatten(0, 1)
        student, taught = logits[:, : self._vocabulary], taught.float().flatten(0, 1)
        divergence = distillation_divergence(student, taught, temperature)
        return (1 - weight) * F.cross_entropy(logits, y) + weight * divergence

    def _cross_entropy(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Cross-entropy summed over all tokens."""
        with self._autocast():
            return self._head_loss(
                self._last_hidden(x), self.model.lm_head.weight, y, self.config.loss_chunk or 0
            )

    def _last_hidden(self, x: torch.Tensor) -> torch.Tensor:
        every = self.config.activation_checkpointing if self.model.training else 0
        return self._hidden(self.model.transformer, x, every)

    def _autocast(self) -> contextlib.AbstractContextManager:
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _tensors(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (B, L) and targets (B * L,) on the device."""
        x, y = (torch.tensor(a, dtype=torch.long, device=self.device) for a in batch)
        return x, y.flatten()


def distillation_divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T^2 KL(teacher || student) of the softmaxes at temperature T, mean over tokens, in nats.

    Args:
        student: The student's logits, (N, V) float32.
        teacher: The teacher's logits, of the same shape.
        temperature: T.
    """
    log_q, log_p = (torch.log_softmax(z / temperature, -1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
