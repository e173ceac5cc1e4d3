"""Communication between ranks through torch.distributed: gloo on CPUs, NCCL on CUDA.

`torchrun` starts the ranks.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlx_mla.errors import UserError

ENGINES = ("gloo", "nccl")
# Ranks wait while rank 0 scores tasks or saves. A rank that dies closes its connection, which the
# others notice at once.
PATIENCE = datetime.timedelta(hours=2)
BUCKET_BYTES = 32 * 2**20


class TorchEngine:
    """See `mlx_mla.world.Engine`.

    Args:
        name: One of `ENGINES`, or "auto": NCCL if CUDA is available, else gloo.
    """

    def __init__(self, name: str = "auto"):
        if name not in ("auto", *ENGINES):
            raise UserError(f"--distributed-backend {name}: PyTorch supports {', '.join(ENGINES)}")
        cuda = torch.cuda.is_available()
        if name == "nccl" and not cuda:
            raise UserError("--distributed-backend nccl: PyTorch sees no CUDA GPU here; use gloo")
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        name = ("nccl" if cuda else "gloo") if name == "auto" else name
        self._device = torch.device("cuda" if name == "nccl" else "cpu")
        try:
            dist.init_process_group(name, timeout=PATIENCE)
        except (RuntimeError, ValueError) as e:
            raise UserError(f"--distributed-backend {name}: {e}; see docs/distributed.md") from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, block: np.ndarray) -> np.ndarray:
        own = torch.tensor(block, device=self._device)
        blocks = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(blocks, own)
        return torch.stack(blocks).cpu().numpy()

    def broadcast(self, tensor: np.ndarray) -> np.ndarray:
        own = torch.tensor(tensor, device=self._device)
        dist.broadcast(own, src=0)
        return own.cpu().numpy()

    def gradient_average(self, parameters: Iterable[torch.nn.Parameter]) -> "GradientAverage":
        return GradientAverage(parameters, self.size, self._device)

    def is_loss(self, error: BaseException) -> bool:
        # gloo raises plain RuntimeErrors that name its source file or a connection.
        text = str(error).lower()
        return isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError)
            or "gloo" in text
            or "nccl" in text
            or "connection" in text
        )

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class GradientAverage:
    """See `mlx_mla.world.GradientAverage`. Sends gradients while the last backward pass still runs.

    DistributedDataParallel does the same for models whose `forward` is called once per pass. Hooks
    on the parameters work however the loss is computed from them.

    Args:
        parameters: The model's parameters, in the same order on every rank.
        device: Device of the tensors that the engine sends.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], size: int, device: torch.device):
        self._size, self._device = size, device
        self._open = False
        self._bucket: list[torch.Tensor] = []
        self._sent: list[tuple[torch.Tensor, list[torch.Tensor], Any]] = []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    @contextlib.contextmanager
    def last_pass(self) -> Iterator[None]:
        """Context that leaves in every parameter's `grad` the mean over the ranks."""
        self._open = True
        yield
        self._open = False
        self._send()
        for flat, gradients, work in self._sent:
            work.wait()
            parts = flat.div_(self._size).split([g.numel() for g in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        self._sent = []

    def mean(self, gradients: Any) -> Any:
        return gradients  # `last_pass` has replaced them with the means

    def _ready(self, parameter: torch.Tensor) -> None:
        if self._open and parameter.grad is not None:
            self._bucket.append(parameter.grad)
            if sum(g.numel() * g.element_size() for g in self._bucket) >= BUCKET_BYTES:
                self._send()

    def _send(self) -> None:
        if self._bucket:
            flat = torch.cat([g.flatten() for g in self._bucket]).to(self._device)
            self._sent.append((flat, self._bucket, dist.all_reduce(flat, async_op=True)))
            self._bucket = []
