"""The MLX backend."""

import contextlib
from collections.abc import Callable, Iterator

import mlx.core as mx

from mlx_mla.backends.blas import in_use
from mlx_mla.backends.contract import Start, Teacher
from mlx_mla.backends.mlx.decode import MLXDecoder
from mlx_mla.backends.mlx.device import DTYPES, find_device, float32_products, on_device
from mlx_mla.backends.mlx.load import load
from mlx_mla.backends.mlx.score import MLXScorer
from mlx_mla.backends.mlx.session import MLXTrainSession
from mlx_mla.backends.peak import measure_peak
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.decoding.request import CacheChoice
from mlx_mla.machine import physical_memory
from mlx_mla.model.config import DType, InferenceDType
from mlx_mla.model.fusion import Device, fused_by_mlx
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.world import SOLO, World

GIB = 2**30
LIMIT = "max_recommended_working_set_size"


class MLXBackend:
    """Runs the model in MLX, on Metal, CUDA or the CPU."""

    name = "mlx"

    def __init__(self, device: str = "auto"):
        self.device = find_device(device)

    def device_info(self) -> dict[str, str]:
        info = mx.device_info(self.device)
        gpu = "Metal" if mx.metal.is_available() else "CUDA" if mx.is_available(mx.gpu) else "none"
        facts = {
            "MLX device": f"{self.device} ({info.get('device_name', 'unknown')})",
            "MLX GPU": gpu,
            "MLX BLAS": in_use(),
            "MLX float32 products": float32_products(self.device),
        }
        if LIMIT in info:
            facts["MLX memory limit"] = f"{int(info[LIMIT]) / GIB:.1f} GiB recommended"
        return facts

    def memory_bytes(self) -> int:
        info = mx.device_info(self.device)
        for key in (LIMIT, "total_memory"):  # Metal's and CUDA's
            if key in info:
                return int(info[key])
        return physical_memory()

    def fused_attention(self, config: TrainConfig) -> bool:
        gpu: Device = "metal" if mx.metal.is_available() else "cuda"
        return fused_by_mlx(gpu if self.device == mx.gpu else "cpu", config)

    @contextlib.contextmanager
    def limited_memory(self, expected: int) -> Iterator[None]:
        info = mx.device_info(self.device)
        if LIMIT in info:  # a Mac's GPU, but not its CPU
            # Wired memory is not paged out. Freed buffers may be cached in the memory that the
            # estimate leaves.
            whole = int(info[LIMIT])
            limits = {
                mx.set_wired_limit: whole,
                mx.set_cache_limit: max(whole - expected, GIB // 2),
            }
        else:
            # On a CPU, MLX enqueues the graph and allocates its memory far ahead of execution. At
            # the limit, it waits.
            limits = {mx.set_memory_limit: expected}
        before = {set_limit: set_limit(value) for set_limit, value in limits.items()}
        try:
            yield
        finally:
            for set_limit, value in before.items():
                set_limit(value)

    @on_device
    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        def product(n: int) -> Callable[[], None]:
            a, b = (
                mx.random.normal((n, n), key=mx.random.key(i)).astype(DTYPES[dtype]) for i in (0, 1)
            )
            mx.eval(a, b)
            return lambda: mx.eval(a @ b)

        peak = measure_peak(product, seconds)
        mx.clear_cache()
        return peak

    def train_session(
        self, config: TrainConfig, start: Start, teacher: Teacher | None = None, world: World = SOLO
    ) -> MLXTrainSession:
        return MLXTrainSession(self.device, config, start, teacher, world)

    def decoder(
        self,
        folder: ModelFolder,
        cache: CacheChoice = "latent",
        dtype: InferenceDType | None = None,
    ) -> MLXDecoder:
        return MLXDecoder(self.device, folder, cache, dtype)

    @on_device
    def scorer(self, folder: ModelFolder, dtype: InferenceDType = "float32") -> MLXScorer:
        model = load(folder, dtype)
        model.eval()
        return MLXScorer(self.device, model, folder.tokenizer)
