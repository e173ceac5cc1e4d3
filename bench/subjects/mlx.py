"""Models in MLX: this project's, and mlx-lm's own GPT-2."""

import dataclasses
import gc
import time
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import gpt2
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from bench.rows import EAGER, Rates
from bench.subjects.contract import Subject, Timed, Trainer, Weights, gpt2_shape, seconds
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.backends.mlx.decode import WithoutCache
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.model.config import DType, ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights


class MLXMemory:
    """See `bench.subjects.contract.Memory`. Create it before the subject."""

    def __init__(self) -> None:
        mx.clear_cache()
        self._before = mx.get_active_memory()
        self.reset()

    def reset(self) -> None:
        mx.reset_peak_memory()

    def peak(self) -> int:
        return max(mx.get_peak_memory(), mx.get_active_memory()) - self._before


class MLXSubject(Subject):
    """A model by mlx-lm's contract: ours, or mlx-lm's own."""

    backend = "mlx"

    def __init__(
        self, model: str, network: Any, config: ModelConfig, dtype: str, memory: MLXMemory
    ):
        super().__init__(model, network, config, memory)
        network.set_dtype(getattr(mx, dtype))
        network.eval()
        mx.eval(network.parameters())

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return np.array(self.network(mx.array(ids)).astype(mx.float32))

    def forward(self, ids: np.ndarray) -> None:
        mx.eval(self.network(mx.array(ids)))

    def first_token(self, ids: np.ndarray, kind: str) -> None:
        self.use(kind)
        network = WithoutCache(self.network) if kind == "none" else self.network
        next(_generated(network, mx.array(ids), make_prompt_cache(network), 1))

    def decode(self, batch: int, context: int, steps: int, kind: str) -> Timed:
        self.use(kind)
        if kind == "none":
            return self._decode_without_cache(context, steps)
        cache = self._filled(batch, context, steps + 2)
        self.memory.reset()
        began, y = time.perf_counter(), mx.zeros((batch, 1), mx.int32)
        for _ in range(steps):
            y = self._step(y, cache)
            mx.eval(y)
        waited = time.perf_counter() - began
        for c in cache:
            c.trim(steps)
        # One step is always under way: that of the first token is not timed, and that of the token
        # after the last is.
        tokens = self._tokens(batch, cache, steps + 1)
        took = _timed(tokens, steps)
        size = sum(c.nbytes for c in cache)
        tokens.close()
        mx.synchronize()
        del cache, tokens
        mx.clear_cache()  # else MLX keeps buffers that no later subject has a use for
        return Timed(took, size, waited)

    def _decode_without_cache(self, context: int, steps: int) -> Timed:
        network = WithoutCache(self.network)
        self.memory.reset()
        prompt = mx.zeros((context,), mx.int32)
        tokens = _generated(network, prompt, make_prompt_cache(network), steps + 1)
        return Timed(_timed(tokens, steps), 0)

    def read_on(self, batch: int, context: int, new: int) -> Timed:
        self.use("latent")
        cache = self._filled(batch, context, new)
        self.memory.reset()
        began = time.perf_counter()
        mx.eval(self.network(mx.zeros((batch, new), mx.int32), cache=cache))
        seconds = time.perf_counter() - began
        del cache
        mx.clear_cache()
        return Timed(seconds)

    def _step(self, y: mx.array, cache: Any) -> mx.array:
        """The next greedy tokens (B, 1), not evaluated."""
        return mx.argmax(self.network(y, cache=cache)[:, -1], axis=-1, keepdims=True)

    def _tokens(self, batch: int, cache: list[Any], count: int) -> Generator[list[int], None, None]:
        """Greedy tokens, the next step under way while one is handed out: by mlx-lm's own loop,
        or, for several sequences, as its `GenerationBatch` does it."""
        if batch == 1:
            for token, _ in _generated(self.network, mx.zeros((1,), mx.int32), cache, count):
                yield [token]
            return

        def step(y: mx.array) -> mx.array:
            logits = self.network(y[:, None], cache=cache)[:, -1]
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
        shapes = make_prompt_cache(self.network)
        mx.eval(self.network(mx.zeros((1, 1), mx.int32), cache=shapes))
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


def _generated(
    network: Any, ids: mx.array, cache: list[Any], max_tokens: int
) -> Generator[Any, None, None]:
    """mlx-lm's loop, which `generate` runs for one prompt."""
    stream = mx.default_stream(mx.default_device())
    return generate_step(ids, network, prompt_cache=cache, max_tokens=max_tokens, stream=stream)


def _timed(tokens: Generator[Any, None, None], count: int) -> float:
    """Seconds of `count` tokens after the first."""
    next(tokens)
    return seconds(lambda: [next(tokens) for _ in range(count)])


def load(
    model: str, config: ModelConfig, weights: Weights, dtype: str, device: str, own: bool = True
) -> MLXSubject:
    """One of this project's models; without `own`, mlx-lm's `gpt2` with the weights of our MHA
    model."""
    mx.set_default_device(MLXBackend(device).device)
    memory = MLXMemory()
    if own:
        network: Any = build_model(config, weights)
    else:
        network = gpt2.Model(gpt2.ModelArgs(model_type="gpt2", **gpt2_shape(config)))
        network.load_weights(
            [(k.replace("transformer.", "model.", 1), mx.array(w)) for k, w in weights.items()]
        )
    return MLXSubject(model, network, config, dtype, memory)


def trainer(config: TrainConfig, device: str, way: str = "") -> Trainer:
    """A training session of this project on random weights; its eager step if that is the way."""
    memory = MLXMemory()
    config = dataclasses.replace(config, compile=config.compile and way != EAGER)
    start = Start(initial_weights(config.model, 0))
    return Trainer(config, MLXBackend(device).train_session(config, start), memory)


def release() -> None:
    """Free the memory of subjects that nothing refers to any more."""
    gc.collect()
    mx.clear_cache()


def rates(dtype: DType, device: str, side: int) -> Rates:
    """Peak rates of the device. Memory is measured by a large copy or matrix-vector product of
    `side` squared values, which must not fit into its caches."""
    backend = MLXBackend(device)
    mx.set_default_device(backend.device)
    b, v = mx.full((side, side), 0.5), mx.full((side,), 0.5)
    mx.eval(b, v)

    def best(action: Callable[[], Any]) -> float:
        return min(seconds(lambda: mx.eval(action())) for _ in range(5))

    product = min(best(lambda: b @ v), best(lambda: v @ b))
    memory = max(2 * b.nbytes / best(lambda: b + 1), b.nbytes / product)
    return {"matmul_flops": backend.peak_flops(dtype, seconds=0.2), "memory_bytes": memory}
