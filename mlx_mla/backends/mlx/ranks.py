"""Communication between ranks in MLX: a ring over TCP, RDMA over Thunderbolt (jaccl), MPI or NCCL.

`mlx.launch` starts the ranks.
"""

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
        name: One of `ENGINES`, or "auto" for the first one whose environment the launcher has set.
    """

    def __init__(self, name: str = "auto"):
        if name not in ("auto", *ENGINES):
            raise UserError(f"--distributed-backend {name}: MLX supports {', '.join(ENGINES)}")
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
        # MLX has no broadcast; summing with zeros has the same effect.
        own = tensor if self.rank == 0 else np.zeros_like(tensor)
        return _numpy(mx.distributed.all_sum(mx.array(own), group=self.group))

    def gradient_average(self, parameters: Iterable[mx.array]) -> "GradientAverage":
        return GradientAverage(self.group)

    def is_loss(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and str(error).startswith(
            ("[ring]", "[jaccl]", "[mpi]", "[nccl]")
        )

    def close(self) -> None:
        """Do nothing: MLX closes its engine when the process ends."""


class GradientAverage:
    """See `mlx_mla.world.GradientAverage`. Works lazily, in reductions of at least 32 MiB where
    possible.

    Nothing waits here. MLX starts each reduction on its communication stream as soon as the
    backward pass has computed its gradients.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group = group

    def last_pass(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mean(self, gradients: Any) -> Any:
        return nn.average_gradients(gradients, group=self._group)


def _numpy(array: mx.array) -> np.ndarray:
    # eval raises if a rank has been lost; np.array alone would return arbitrary memory (mlx
    # 0.32.4).
    mx.eval(array)
    return np.array(array)
