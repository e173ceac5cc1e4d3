"""Models in MLX for compare_backends: this project's, and mlx-lm's own GPT-2."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import gpt2
from mlx_lm.models.cache import KVCache, make_prompt_cache

from bench.subjects.contract import Weights, gpt2_shape
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.backends.mlx.device import stream_of
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.config import DType, ModelConfig, TrainConfig
from mlx_mla.weights import initial_weights


class MLXSubject:
    """A model by mlx-lm's contract: ours, or mlx-lm's own."""

    backend = "mlx"

    def __init__(self, model: str, network: Any, config: ModelConfig, dtype: str):
        self.model, self.config = model, config
        self.device_kind = "cpu" if mx.default_device() == mx.cpu else "gpu"
        self._dtype = {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]
        self._network = network
        self._network.set_dtype(self._dtype)
        self._network.eval()
        mx.eval(self._network.parameters())

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return np.array(self._network(mx.array(ids)).astype(mx.float32))

    def forward(self, ids: np.ndarray) -> None:
        mx.eval(self._network(mx.array(ids)))

    def first_token(self, ids: np.ndarray, kind: str) -> None:
        self._use(kind)
        stream = stream_of(mx.default_device())
        next(generate_step(mx.array(ids), self._network, max_tokens=1, **stream))

    def decode(self, batch: int, context: int, steps: int, kind: str) -> tuple[float, int]:
        self._use(kind)
        cache = self._filled(batch, context, steps)
        y = mx.zeros((batch, 1), mx.int32)
        began = time.perf_counter()
        for _ in range(steps):
            y = mx.argmax(self._network(y, cache=cache)[:, -1], axis=-1, keepdims=True)
            mx.eval(y)
        seconds, size = time.perf_counter() - began, sum(c.nbytes for c in cache)
        del cache
        mx.clear_cache()  # else MLX keeps the caches of all subjects
        return seconds, size

    def read_on(self, batch: int, context: int, new: int) -> float:
        self._use("latent")
        cache = self._filled(batch, context, new)
        began = time.perf_counter()
        mx.eval(self._network(mx.zeros((batch, new), mx.int32), cache=cache))
        seconds = time.perf_counter() - began
        del cache
        mx.clear_cache()
        return seconds

    def python_overhead(self, context: int, steps: int) -> tuple[float, float]:
        """Seconds that Python takes to describe a step at batch 1, and that MLX then takes to
        compute it (medians)."""
        self._use("latent")
        cache, y = self._filled(1, context, steps), mx.zeros((1, 1), mx.int32)
        return _apart(
            lambda y: mx.argmax(self._network(y, cache=cache)[:, -1], axis=-1, keepdims=True),
            y,
            steps,
        )

    def compiled_overhead(self, context: int, steps: int, bucket: int = 256) -> tuple[float, float]:
        """The same with one compiled graph on a cache of fixed size, the next multiple of
        `bucket`."""
        self._use("latent")
        size = -(-(context + steps) // bucket) * bucket
        state = [mx.array([context]), *(c.keys for c in self._filled(1, size - 1, 1))]

        def step(y: mx.array, offset: mx.array, *keys: mx.array) -> tuple[mx.array, ...]:
            caches = [FixedCache(k, offset) for k in keys]
            y = mx.argmax(self._network(y, cache=caches)[:, -1], axis=-1, keepdims=True)
            return y, offset + 1, *(c.keys for c in caches)

        compiled = mx.compile(step)

        def advance(y: mx.array) -> mx.array:
            y, *state[:] = compiled(y, *state)
            return y

        return _apart(advance, mx.zeros((1, 1), mx.int32), steps)

    def train_step(self, config: TrainConfig) -> Callable[[np.ndarray, np.ndarray], None]:
        backend = MLXBackend(self.device_kind)
        session = backend.train_session(config, Start(initial_weights(config.model, 0)))

        def step(x: np.ndarray, y: np.ndarray) -> None:
            session.step(0, 1e-4, [(x, y)])

        return step

    def peak_memory_bytes(self) -> int | None:
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak

    def _use(self, kind: str) -> None:
        if hasattr(self._network, "materialize_cache"):
            self._network.materialize_cache(kind == "materialized")

    def _filled(self, batch: int, context: int, steps: int) -> list[Any]:
        """A cache that holds a context, with room for the steps: decoding takes as long whatever
        the values are."""
        shapes = make_prompt_cache(self._network)
        mx.eval(self._network(mx.zeros((1, 1), mx.int32), cache=shapes))
        cache = []
        for like in shapes:
            c = KVCache()
            shape = (batch, like.keys.shape[1], context + steps)
            keys, values = (
                mx.full((*shape, a.shape[-1]), 0.01, a.dtype) for a in (like.keys, like.values)
            )
            c.update_and_fetch(keys, values)
            c.trim(steps)
            cache.append(c)
        mx.eval([(c.keys, c.values) for c in cache])
        return cache


class FixedCache:
    """A latent cache of fixed size whose length is an array, so that a compiled graph serves every
    length."""

    def __init__(self, keys: mx.array, offset: mx.array):
        self.keys, self.offset = keys, offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys, self.offset, axes=(2,))
        return self.keys, values

    def make_mask(self, *_: Any, **__: Any) -> mx.array:
        return (mx.arange(self.keys.shape[2]) <= self.offset)[None, None, None]

    def size(self) -> int:
        return 0  # the table has room: the benchmark sees to it


def _apart(advance: Callable[[mx.array], mx.array], y: mx.array, steps: int) -> tuple[float, float]:
    described, computed = [], []
    for _ in range(steps):
        began = time.perf_counter()
        y = advance(y)
        between = time.perf_counter()
        mx.eval(y)
        described.append(between - began)
        computed.append(time.perf_counter() - between)
    return statistics.median(described), statistics.median(computed)


def ours(model: str, config: ModelConfig, weights: Weights, dtype: str, device: str) -> MLXSubject:
    """One of this project's models."""
    mx.set_default_device(MLXBackend(device).device)
    return MLXSubject(model, build_model(config, weights), config, dtype)


def reference(config: ModelConfig, weights: Weights, dtype: str, device: str) -> MLXSubject:
    """mlx-lm's `gpt2` with the weights of our MHA model."""
    mx.set_default_device(MLXBackend(device).device)
    network = gpt2.Model(gpt2.ModelArgs(model_type="gpt2", **gpt2_shape(config)))
    network.load_weights(
        [(k.replace("transformer.", "model.", 1), mx.array(w)) for k, w in weights.items()]
    )
    return MLXSubject("mlx-lm gpt2", network, config, dtype)


def rates(dtype: DType) -> tuple[float, float]:
    """FLOP/s of large matrix products, and bytes per second of a large copy or matrix-vector
    product."""
    b = mx.random.normal((8192, 8192))
    v = mx.random.normal((8192,))
    mx.eval(b, v)

    def best(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            began = time.perf_counter()
            mx.eval(action())
            times.append(time.perf_counter() - began)
        return min(times)

    memory = max(
        2 * b.nbytes / best(lambda: b + 1), b.nbytes / min(best(lambda: b @ v), best(lambda: v @ b))
    )
    backend = MLXBackend("cpu" if mx.default_device() == mx.cpu else "gpu")
    return backend.peak_flops(dtype, seconds=1.0), memory
