"""The PyTorch backend."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from mlx_mla.backends.contract import Start, Teacher
from mlx_mla.backends.peak import measure_peak
from mlx_mla.backends.torch.decode import TorchDecoder
from mlx_mla.backends.torch.device import find_device
from mlx_mla.backends.torch.load import load
from mlx_mla.backends.torch.score import TorchScorer
from mlx_mla.backends.torch.session import TorchTrainSession
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.decoding.request import CacheChoice
from mlx_mla.machine import physical_memory
from mlx_mla.model.config import DType, InferenceDType
from mlx_mla.model.fusion import fused_by_torch
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.world import SOLO, World


class TorchBackend:
    """Runs the model in PyTorch."""

    name = "torch"

    def __init__(self, device: str = "auto"):
        self.device = find_device(device)

    def device_info(self) -> dict[str, str]:
        blas = "MKL" if torch.backends.mkl.is_available() else "other"
        device = self.device.type
        if device == "cuda":
            device += f" ({torch.cuda.get_device_name(self.device)})"
        return {
            "PyTorch device": device,
            "PyTorch BLAS": f"{blas}, {torch.get_num_threads()} threads",
        }

    def memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        return (
            torch.mps.recommended_max_memory() if self.device.type == "mps" else physical_memory()
        )

    def fused_attention(self, config: TrainConfig) -> bool:
        return fused_by_torch(self.device.type, config)

    def limited_memory(self, expected: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # PyTorch allocates memory as it computes

    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        def product(n: int) -> Callable[[], None]:
            random = torch.Generator(self.device).manual_seed(0)
            like: dict[str, Any] = {
                "device": self.device,
                "dtype": getattr(torch, dtype),
                "generator": random,
            }
            a, b = (torch.randn(n, n, **like) for _ in range(2))

            def multiply() -> None:
                a @ b
                if self.device.type != "cpu":
                    getattr(torch, self.device.type).synchronize()

            return multiply

        return measure_peak(product, seconds)

    def train_session(
        self, config: TrainConfig, start: Start, teacher: Teacher | None = None, world: World = SOLO
    ) -> TorchTrainSession:
        return TorchTrainSession(self.device, config, start, teacher, world)

    def decoder(
        self,
        folder: ModelFolder,
        cache: CacheChoice = "latent",
        dtype: InferenceDType | None = None,
    ) -> TorchDecoder:
        return TorchDecoder(folder, cache, self.device, dtype)

    def scorer(self, folder: ModelFolder, dtype: InferenceDType = "float32") -> TorchScorer:
        return TorchScorer(load(folder, self.device, dtype), folder.tokenizer)
