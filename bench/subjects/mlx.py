"""Models in MLX for compare_backends: this project's, and mlx-lm's own GPT-2."""

import statistics
import time
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import gpt2
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from bench.subjects.contract import Timed, Weights, gpt2_shape
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.backends.mlx.device import device_type, stream_of
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.model.config import DType, ModelConfig, TrainConfig
from mlx_mla.model.weights import initial_weights


class MLXMemory:
    """See `bench.subjects.contract.Memory`. To be made before the subject is."""

    def __init__(self) -> None:
        mx.clear_cache()
        self._before = mx.get_active_memory()
        self.reset()

    def reset(self) -> None:
        mx.reset_peak_memory()

    def peak(self) -> int:
        return max(mx.get_peak_memory(), mx.get_active_memory()) - self._before


class MLXSubject:
    """A model by mlx-lm's contract: ours, or mlx-lm's own."""

    backend = "mlx"

    def __init__(
        self, model: str, network: Any, config: ModelConfig, dtype: str, memory: MLXMemory
    ):
        self.model, self.config, self.memory = model, config, memory
        self.device_kind = device_type(mx.default_device())
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
        next(self._generated(mx.array(ids), make_prompt_cache(self._network), 1))

    def decode(self, batch: int, context: int, steps: int, kind: str) -> Timed:
        self._use(kind)
        cache = self._filled(batch, context, steps + 2)
        self.memory.reset()
        y = mx.zeros((batch, 1), mx.int32)
        began = time.perf_counter()
        for _ in range(steps):
            y = mx.argmax(self._network(y, cache=cache)[:, -1], axis=-1, keepdims=True)
            mx.eval(y)
        waited = time.perf_counter() - began
        for c in cache:
            c.trim(steps)
        # One step is always under way: that of the first token is not timed, and that of the token
        # after the last is.
        tokens = self._tokens(batch, cache, steps + 1)
        next(tokens)
        began = time.perf_counter()
        for _ in range(steps):
            next(tokens)
        seconds, size = time.perf_counter() - began, sum(c.nbytes for c in cache)
        tokens.close()
        mx.synchronize()
        del cache, tokens
        mx.clear_cache()  # else MLX keeps buffers that no later subject has a use for
        return Timed(seconds, size, waited)

    def read_on(self, batch: int, context: int, new: int) -> Timed:
        self._use("latent")
        cache = self._filled(batch, context, new)
        self.memory.reset()
        began = time.perf_counter()
        mx.eval(self._network(mx.zeros((batch, new), mx.int32), cache=cache))
        seconds = time.perf_counter() - began
        del cache
        mx.clear_cache()
        return Timed(seconds)

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

    def _use(self, kind: str) -> None:
        if hasattr(self._network, "materialize_cache"):
            self._network.materialize_cache(kind == "materialized")

    def _generated(self, ids: mx.array, cache: list[Any], max_tokens: int) -> Any:
        """mlx-lm's loop, which `generate` runs for one prompt."""
        stream = stream_of(mx.default_device())
        return generate_step(
            ids, self._network, prompt_cache=cache, max_tokens=max_tokens, **stream
        )

    def _tokens(self, batch: int, cache: list[Any], count: int) -> Generator[list[int], None, None]:
        """Greedy tokens, the next step under way while one is handed out: by mlx-lm's own loop,
        or, for several sequences, as its `GenerationBatch` does it."""
        if batch == 1:
            for token, _ in self._generated(mx.zeros((1,), mx.int32), cache, count):
                yield [token]
            return

        def step(y: mx.array) -> mx.array:
            logits = self._network(y[:, None], cache=cache)[:, -1]
            y = mx.argmax(logits - mx.logsumexp(logits, axis=-1, keepdims=True), axis=-1)
            mx.async_eval(y)
            return y

        y = step(mx.zeros((batch,), mx.int32))
        for _ in range(count):
            following = step(y)
            yield y.tolist()  # type: ignore[misc]
            y = following

    def _filled(self, batch: int, context: int, steps: int) -> list[Any]:
        """The cache that `generate` has after a context, with room for the steps: decoding takes
        as long whatever the values are."""
        shapes = make_prompt_cache(self._network)
        mx.eval(self._network(mx.zeros((1, 1), mx.int32), cache=shapes))
        room = -(-(context + steps) // KVCache.step) * KVCache.step
        cache: list[Any] = []
        for like in shapes:
            shape = (batch, like.keys.shape[1], room)
            keys, values = (
                mx.full((*shape, a.shape[-1]), 0.01, a.dtype) for a in (like.keys, like.values)
            )
            if batch == 1:
                c: Any = KVCache()
                c.keys, c.values, c.offset = keys, values, context
            else:
                c = BatchKVCache([0] * batch)
                c.keys, c.values, c._idx = keys, values, context
                c.offset = c.offset + context
            cache.append(c)
        mx.eval([(c.keys, c.values, c.offset) for c in cache])
        return cache


class Trainer:
    """See `bench.subjects.contract.Trainer`."""

    def __init__(self, config: TrainConfig, device: str):
        self.memory = MLXMemory()
        self._session = MLXBackend(device).train_session(
            config, Start(initial_weights(config.model, 0))
        )

    def step(self, x: np.ndarray, y: np.ndarray) -> None:
        self._session.step(0, 1e-4, [(x, y)])


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
    memory = MLXMemory()
    return MLXSubject(model, build_model(config, weights), config, dtype, memory)


def reference(config: ModelConfig, weights: Weights, dtype: str, device: str) -> MLXSubject:
    """mlx-lm's `gpt2` with the weights of our MHA model."""
    mx.set_default_device(MLXBackend(device).device)
    memory = MLXMemory()
    network = gpt2.Model(gpt2.ModelArgs(model_type="gpt2", **gpt2_shape(config)))
    network.load_weights(
        [(k.replace("transformer.", "model.", 1), mx.array(w)) for k, w in weights.items()]
    )
    return MLXSubject("mlx-lm gpt2", network, config, dtype, memory)


def release() -> None:
    """Give freed buffers back to the system."""
    mx.clear_cache()


def rates(dtype: DType, side: int) -> tuple[float, float]:
    """FLOP/s of large matrix products, and bytes per second of a large copy or matrix-vector
    product of `side` squared values."""
    memory = _memory_rate(side)
    mx.clear_cache()
    backend = MLXBackend(device_type(mx.default_device()))
    return backend.peak_flops(dtype, seconds=0.2), memory


def _memory_rate(side: int) -> float:
    b, v = mx.full((side, side), 0.5), mx.full((side,), 0.5)
    mx.eval(b, v)

    def best(action: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            mx.eval(action())
            times.append(time.perf_counter() - began)
        return min(times)

    product = min(best(lambda: b @ v), best(lambda: v @ b))
    return max(2 * b.nbytes / best(lambda: b + 1), b.nbytes / product)
