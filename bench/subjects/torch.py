"""Models in PyTorch for compare_backends: this project's, and transformers' own GPT-2."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from bench.subjects.contract import Timed, Weights, gpt2_shape
from mlx_mla.backends.contract import Start
from mlx_mla.backends.torch.backend import TorchBackend
from mlx_mla.backends.torch.caches import GrowingCache
from mlx_mla.backends.torch.load import build_model
from mlx_mla.backends.torch.session import TorchTrainSession
from mlx_mla.model.config import DType, ModelConfig, TrainConfig
from mlx_mla.model.weights import initial_weights


class TorchMemory:
    """See `bench.subjects.contract.Memory`. To be made before the subject is.

    MPS keeps no peak: there it is what the driver has given since the subject began to be loaded,
    filling of caches included. On a CPU nobody counts.
    """

    def __init__(self, device: torch.device):
        self._device = device
        release()
        self._before = self._held() or 0
        self.reset()

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        held = self._held()
        return None if held is None else held - self._before

    def _held(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return torch.mps.driver_allocated_memory() if self._device.type == "mps" else None


class TorchSubject:
    """A model by transformers' contract: ours, or transformers' own."""

    backend = "torch"

    def __init__(
        self,
        model: str,
        network: Any,
        config: ModelConfig,
        dtype: str,
        device: torch.device,
        memory: TorchMemory,
    ):
        self.model, self.config, self.device, self.device_kind = model, config, device, device.type
        self.memory = memory
        self.fixed_shapes = device.type == "mps"  # as for `TorchDecoder`
        self._network = network.to(
            device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        ).eval()

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self._network(self._ids(ids), use_cache=False).logits.float().cpu().numpy()

    def forward(self, ids: np.ndarray) -> None:
        with torch.inference_mode():
            self._network(self._ids(ids), use_cache=False)
        self._synchronize()

    def first_token(self, ids: np.ndarray, kind: str) -> None:
        self._use(kind)
        with torch.inference_mode():
            cache = None if kind == "none" else DynamicCache()
            out = self._network(
                self._ids(ids[None]),
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=1,
            )
            out.logits[:, -1].argmax(-1).tolist()

    def decode(self, batch: int, context: int, steps: int, kind: str) -> Timed:
        self._use(kind)
        y = torch.zeros((batch, 1), dtype=torch.long, device=self.device)
        if kind == "none":
            self.memory.reset()
            return self._decode_without_cache(y.expand(batch, context), steps)
        with torch.inference_mode():
            cache = self._filled(batch, context - 1)
            self.memory.reset()
            began = 0.0
            for i in range(steps + 1):
                if i == 1:  # the step before made room in the cache
                    began = time.perf_counter()
                out = self._network(
                    y,
                    attention_mask=self._mask(batch, context + i),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                y = out.logits[:, -1].argmax(-1, keepdim=True)
                y.tolist()  # waits, as `generate` does for every token
            seconds = time.perf_counter() - began
        return Timed(seconds, _cache_bytes(cache))

    def read_on(self, batch: int, context: int, new: int) -> Timed:
        self._use("latent")
        with torch.inference_mode():
            cache = self._filled(batch, context)
            self.memory.reset()
            y = torch.zeros((batch, new), dtype=torch.long, device=self.device)
            began = time.perf_counter()
            self._network(y, past_key_values=cache, use_cache=True)
            self._synchronize()
            return Timed(time.perf_counter() - began)

    def _mask(self, batch: int, keys: int) -> torch.Tensor | None:
        """What `generate` hides of several prompts: nothing here, where all are as long. A fixed
        cache has a column for every position."""
        if batch == 1:
            return None
        width = self.config.n_positions if self._fixed else keys
        return torch.ones((batch, width), dtype=torch.long, device=self.device)

    @property
    def _fixed(self) -> bool:
        return self.fixed_shapes and hasattr(self._network, "materialize_cache")

    def _new_cache(self) -> Any:
        """The cache that `generate` has on this device, for our models; transformers' for its
        own."""
        if not hasattr(self._network, "materialize_cache"):
            return DynamicCache()
        if self._fixed:
            return StaticCache(config=self._network.config, max_cache_len=self.config.n_positions)
        return GrowingCache()

    def _filled(self, batch: int, context: int) -> Any:
        """That cache with a context in it."""
        shapes = DynamicCache()
        self._network(
            torch.zeros((1, 1), dtype=torch.long, device=self.device),
            past_key_values=shapes,
            use_cache=True,
        )
        cache = self._new_cache()
        for i, layer in enumerate(shapes.layers):
            keys, values = (
                torch.full(
                    (batch, layer.keys.shape[1], context, a.shape[-1]),
                    0.01,
                    dtype=a.dtype,
                    device=a.device,
                )
                for a in (layer.keys, layer.values)
            )
            cache.update(keys, values, i)
        self._synchronize()
        return cache

    def _decode_without_cache(self, ids: torch.Tensor, steps: int) -> Timed:
        """How the original project decoded: the whole context again for every token."""
        with torch.inference_mode():
            began = time.perf_counter()
            for _ in range(steps):
                logits = self._network(ids, use_cache=False).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
                self._synchronize()
            return Timed(time.perf_counter() - began, 0)

    def _use(self, kind: str) -> None:
        if hasattr(self._network, "materialize_cache"):
            self._network.materialize_cache(kind == "materialized")

    def _ids(self, ids: np.ndarray) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


class Trainer:
    """See `bench.subjects.contract.Trainer`."""

    def __init__(self, config: TrainConfig, device: str):
        place = TorchBackend(device).device
        self.memory = TorchMemory(place)
        self._session = TorchTrainSession(place, config, Start(initial_weights(config.model, 0)))

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        self._session.step(0, 1e-4, [(x, y)])


def _cache_bytes(cache: Any) -> int:
    return sum(t.numel() * t.element_size() for c in cache.layers for t in (c.keys, c.values))


def ours(
    model: str, config: ModelConfig, weights: Weights, dtype: str, device: str
) -> TorchSubject:
    """One of this project's models."""
    place = TorchBackend(device).device
    memory = TorchMemory(place)
    return TorchSubject(model, build_model(config, weights, place), config, dtype, place, memory)


def reference(config: ModelConfig, weights: Weights, dtype: str, device: str) -> TorchSubject:
    """transformers' GPT2LMHeadModel with the weights of our MHA model."""
    place = TorchBackend(device).device
    memory = TorchMemory(place)
    network = reference_network(config, weights)
    return TorchSubject("transformers GPT-2", network, config, dtype, place, memory)


def release() -> None:
    """Give freed memory back to the driver."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def reference_network(config: ModelConfig, weights: Weights) -> GPT2LMHeadModel:
    """transformers' GPT-2 with our weights, without dropout, on the CPU."""
    network = GPT2LMHeadModel(
        GPT2Config(**gpt2_shape(config), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) there
    state = {k: torch.tensor(w.T.copy() if k.endswith(conv1d) else w) for k, w in weights.items()}
    network.load_state_dict(state, strict=False)
    network.tie_weights()
    return network


def rates(dtype: DType, device: str, side: int) -> tuple[float, float]:
    """FLOP/s of large matrix products, and bytes per second of a large copy or matrix-vector
    product of `side` squared values."""
    backend = TorchBackend(device)
    place = backend.device
    b = torch.full((side, side), 0.5, device=place)
    v, target = torch.full((side,), 0.5, device=place), torch.empty_like(b)

    def best(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            action()
            if place.type != "cpu":
                getattr(torch, place.type).synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    size = b.numel() * b.element_size()
    memory = max(
        2 * size / best(lambda: target.copy_(b)),
        size / min(best(lambda: b @ v), best(lambda: v @ b)),
    )
    return backend.peak_flops(dtype, seconds=0.2), memory
