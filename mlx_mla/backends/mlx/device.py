"""The device that MLX computes on. It is set per call, so no call affects another one."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import mlx.core as mx

from mlx_mla.errors import UserError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

P = ParamSpec("P")
R = TypeVar("R")


class HasDevice(Protocol):
    device: mx.Device


S = TypeVar("S", bound=HasDevice)


def find_device(name: str) -> mx.Device:
    """Return the device of a --device value; UserError if it is not available."""
    if name in ("mps", "cuda"):
        raise UserError(f"--device {name} requires --backend torch; for MLX's GPU use --device gpu")
    has_gpu = mx.is_available(mx.gpu)
    if name == "gpu" and not has_gpu:
        raise UserError("--device gpu: MLX sees no GPU here; use --device cpu or auto")
    return mx.Device(mx.gpu if has_gpu and name != "cpu" else mx.cpu)


def device_type(device: mx.Device) -> str:
    """Return "cpu" or "gpu"."""
    return "cpu" if device == mx.cpu else "gpu"


def float32_products(device: mx.Device) -> str:
    """Describe how a device multiplies float32 matrices, for display.

    MLX reads MLX_ENABLE_TF32 once, at its first product.
    """
    if device == mx.cpu or os.environ.get("MLX_ENABLE_TF32") == "0":
        return "float32"
    return "TF32 where the GPU has it (MLX_ENABLE_TF32=0: float32)"


def on_device(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Run a method, or every step of a generator, on `self.device`, and restore MLX's default
    afterwards."""
    if inspect.isgeneratorfunction(method):

        @functools.wraps(method)
        def steps(self: S, *args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
            inner: Any = method(self, *args, **kwargs)
            end = object()
            try:
                while True:
                    with mx.stream(self.device):
                        value = next(inner, end)
                    if value is end:
                        return
                    yield value
            finally:
                with mx.stream(self.device):
                    inner.close()

        return steps  # type: ignore[return-value]

    @functools.wraps(method)
    def run(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with mx.stream(self.device):
            return method(self, *args, **kwargs)

    return run
