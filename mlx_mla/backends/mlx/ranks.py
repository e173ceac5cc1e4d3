"""Ranks that talk by MLX: a ring over TCP, RDMA over Thunderbolt (jaccl), MPI or NCCL; `mlx.launch`
starts them."""

import contextlib
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlx_mla.errors import UserError

ENGINES = ("ring", "jaccl", "mpi", "nccl")


class MLXEngine:
    """See `mlx_mla.world.Engine`.

    Args:
        name: One of `ENGINES`, or "auto": the first for which the launcher has set the environment.
    """

    def __init__(self, name: str = "auto"):
        if name not in ("auto", *ENGINES):
            raise UserError(f"--distributed-backend {name}: MLX has {', '.join(ENGINES)}")
        try:
            self.group = mx.distributed.init(strict=True, backend="any" if name == "auto" else name)
        except RuntimeError as e:
            raise UserError(f"--distributed-backend {name}: {e}; see docs/distributed.md") from None
        self.rank, self.size = self.group.rank(), self.group.size()

    def all_gather(self, block: np.ndarray) -> np.ndarray:
        return _numpy(mx.distributed.all_gather(mx.array(block), group=self.group)).reshape(
            self.size, -1
        )

    def broadcast(self, tensor: np.ndarray) -> np.ndarray:
        # MLX has no broadcast; a sum with zeros is one.
        own = tensor if self.rank == 0 else np.zeros_like(tensor)
        return _numpy(mx.distributed.all_sum(mx.array(own), group=self.group))

    def gradient_average(self, parameters: Iterable[mx.array]) -> "GradientAverage":
        return GradientAverage(self.group)

    def is_loss(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and str(error).startswith(
            ("[ring]", "[jaccl]", "[mpi]", "[nccl]")
        )

    def close(self) -> None:
        """MLX ends its engine with the process."""


class GradientAverage:
    """See `mlx_mla.world.GradientAverage`; lazily, in reductions of at least 32 MiB, if there is so
    much.

    Nothing waits here, so MLX starts each reduction, on its communication stream, as soon as the
    backward pass has made the gradients in it.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group = group

    def last_pass(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mean(self, gradients: Any) -> Any:
        return nn.average_gradients(gradients, group=self._group)


def _numpy(array: mx.array) -> np.ndarray:
    # eval raises when a rank has been lost; np.array alone would give what happened to be in memory
    # (mlx 0.32.4).
    mx.eval(array)
    return np.array(array)
