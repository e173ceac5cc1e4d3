"""Frameworks that run the model, by name; the one place that imports them."""

from mlx_mla.backends import blas
from mlx_mla.backends.contract import Backend
from mlx_mla.errors import UserError, add_hint
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.world import Engine


def get_backend(name: BackendName, device: DeviceName = "auto") -> Backend:
    """The backend by its command-line name, on a device; imports its framework.

    Raises:
        UserError: If the framework is not installed, or the device is not there.
    """
    try:
        if name == "torch":
            from mlx_mla.backends.torch.backend import TorchBackend

            return TorchBackend(device)
        from mlx_mla.backends.mlx.backend import MLXBackend

        add_hint(blas.hint())
        return MLXBackend(device)
    except ModuleNotFoundError as e:
        if (e.name or "").split(".")[0] not in ("torch", "mlx", "mlx_lm"):
            raise
        raise UserError(
            f"--backend {name}: {e.name} is not installed; pip install {e.name}"
        ) from None


def get_engine(name: BackendName, engine: str = "auto") -> Engine:
    """A framework's communication between the processes that its launcher has started.

    Args:
        engine: A value of --distributed-backend.

    Raises:
        UserError: If the framework has no such engine, or it cannot start.
    """
    if name == "torch":
        from mlx_mla.backends.torch.ranks import TorchEngine

        return TorchEngine(engine)
    from mlx_mla.backends.mlx.ranks import MLXEngine

    return MLXEngine(engine)
