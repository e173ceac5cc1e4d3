"""The device that PyTorch computes on, and its peak memory."""

import torch

from mlx_mla.errors import UserError
from mlx_mla.machine import peak_memory


def find_device(name: str) -> torch.device:
    """Return the device of a --device value; UserError if it is not available."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    found = [device for device, is_there in there.items() if is_there]
    if name == "auto":
        return torch.device(found[0])
    if name == "gpu" and len(found) > 1:
        return torch.device(found[0])
    if name not in found:
        raise UserError(
            f"--device {name}: PyTorch has {', '.join(found)} here; use one of these, or auto"
        )
    return torch.device(name)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: of PyTorch's allocator on CUDA, of the process on a CPU.

    On MPS, the memory that the driver currently holds.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return peak_memory()
