"""What compare_backends times: one model in one framework, behind one small interface."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import mlx_mla._openblas  # noqa: F401  (before mlx)
from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.estimate import BYTES, cache_bytes_per_token
from mlx_mla.weights import initial_weights, num_parameters

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from transformers import DynamicCache

Weights = dict[str, np.ndarray]


class Subject(Protocol):
    """A model ready to be timed. Every timed call returns only when the device has finished."""

    model: str
    backend: str
    config: ModelConfig

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, T, vocab_size) in float32, for the parity gate."""
        ...

    def forward(self, ids: np.ndarray) -> None:
        """One forward pass over ids (B, T), logits of every position, no cache."""
        ...

    def first_token(self, ids: np.ndarray, kind: str) -> None:
        """Read a prompt (T,) into a new cache and choose the next token."""
        ...

    def decode(self, batch: int, context: int, steps: int, kind: str) -> tuple[float, int]:
        """Seconds of `steps` greedy steps after a context that is in the cache, and the cache's bytes."""
        ...

    def train_step(self, config: TrainConfig) -> Callable[[np.ndarray, np.ndarray], None]:
        """A function that takes one optimiser step on (inputs, targets)."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Most bytes held since the last call; None where the framework does not say."""
        ...


class MLXSubject:
    """A model by mlx-lm's contract: ours, or mlx-lm's own."""

    backend = "mlx"

    def __init__(self, model: str, network: Any, config: ModelConfig, dtype: str):
        self.model, self.config = model, config
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
        next(generate_step(mx.array(ids), self._network, max_tokens=1))

    def decode(self, batch: int, context: int, steps: int, kind: str) -> tuple[float, int]:
        self._use(kind)
        cache = self._filled(batch, context)
        y = mx.zeros((batch, 1), mx.int32)
        began = time.perf_counter()
        for _ in range(steps):
            y = mx.argmax(self._network(y, cache=cache)[:, -1], axis=-1, keepdims=True)
            mx.eval(y)
        return time.perf_counter() - began, sum(c.nbytes for c in cache)

    def train_step(self, config: TrainConfig) -> Callable[[np.ndarray, np.ndarray], None]:
        from mlx_mla.backend_mlx import MLXTrainSession

        session = MLXTrainSession(config, initial_weights(config.model, 0), None, 0)

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

    def _filled(self, batch: int, context: int) -> list[Any]:
        """A cache that holds a context: decoding takes as long whatever its values are."""
        shapes = make_prompt_cache(self._network)
        mx.eval(self._network(mx.zeros((1, 1), mx.int32), cache=shapes))
        cache = []
        for like in shapes:
            c = KVCache()
            heads = like.keys.shape[1]
            keys, values = (
                mx.full((batch, heads, context, a.shape[-1]), 0.01, a.dtype) for a in (like.keys, like.values)
            )
            c.update_and_fetch(keys, values)
            cache.append(c)
        mx.eval([(c.keys, c.values) for c in cache])
        return cache


class TorchSubject:
    """A model by transformers' contract: ours, or transformers' own."""

    backend = "torch"

    def __init__(self, model: str, network: Any, config: ModelConfig, dtype: str, device: torch.device):
        self.model, self.config, self.device = model, config, device
        self._network = network.to(device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]).eval()

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
                self._ids(ids[None]), past_key_values=cache, use_cache=cache is not None, logits_to_keep=1
            )
            out.logits[:, -1].argmax(-1).tolist()

    def decode(self, batch: int, context: int, steps: int, kind: str) -> tuple[float, int]:
        self._use(kind)
        y = torch.zeros((batch, 1), dtype=torch.long, device=self.device)
        if kind == "none":
            return self._decode_without_cache(y.expand(batch, context), steps), 0
        with torch.inference_mode():
            shapes = DynamicCache()
            self._network(y[:1], past_key_values=shapes, use_cache=True)
            cache = DynamicCache()
            for i, layer in enumerate(shapes.layers):
                keys, values = (
                    torch.full((batch, layer.keys.shape[1], context, a.shape[-1]), 0.01, dtype=a.dtype, device=a.device)
                    for a in (layer.keys, layer.values)
                )
                cache.update(keys, values, i)
            self._synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                out = self._network(y, past_key_values=cache, use_cache=True, logits_to_keep=1)
                y = out.logits[:, -1].argmax(-1, keepdim=True)
                self._synchronize()
            seconds = time.perf_counter() - began
        return seconds, sum(t.numel() * t.element_size() for c in cache.layers for t in (c.keys, c.values))

    def _decode_without_cache(self, ids: torch.Tensor, steps: int) -> float:
        """How the original project decoded: the whole context again for every token."""
        with torch.inference_mode():
            began = time.perf_counter()
            for _ in range(steps):
                logits = self._network(ids, use_cache=False).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
                self._synchronize()
            return time.perf_counter() - began

    def train_step(self, config: TrainConfig) -> Callable[[np.ndarray, np.ndarray], None]:
        from mlx_mla.backend_torch import TorchTrainSession

        session = TorchTrainSession(self.device, config, initial_weights(config.model, 0), None, 0)

        def step(x: np.ndarray, y: np.ndarray) -> None:
            session.step(0, 1e-4, [(x, y)])

        return step

    def peak_memory_bytes(self) -> int | None:
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def _use(self, kind: str) -> None:
        if hasattr(self._network, "materialize_cache"):
            self._network.materialize_cache(kind == "materialized")

    def _ids(self, ids: np.ndarray) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def ours(model: str, backend: str, config: ModelConfig, weights: Weights, dtype: str, device: str) -> Subject:
    """One of this project's models in a backend."""
    if backend == "mlx":
        from mlx_mla import backend_mlx

        backend_mlx.MLXBackend(device if device in ("cpu", "gpu") else "auto")
        return MLXSubject(model, backend_mlx.build_model(config, weights), config, dtype)
    from mlx_mla import backend_torch

    place = backend_torch.TorchBackend(device).device
    return TorchSubject(model, backend_torch.build_model(config, weights, place), config, dtype, place)


def outside_gpt2(backend: str, config: ModelConfig, weights: Weights, dtype: str, device: str) -> Subject:
    """GPT-2 of the ecosystem with the weights of our MHA model: mlx-lm's `gpt2`, or transformers' GPT2LMHeadModel."""
    assert config.attention == "mha"
    shape: dict[str, Any] = {
        "n_embd": config.n_embd, "n_head": config.n_head, "n_layer": config.n_layer, "n_positions": config.n_positions,
        "n_ctx": config.n_positions, "vocab_size": config.vocab_size, "layer_norm_epsilon": config.layer_norm_epsilon,
    }  # fmt: skip
    if backend == "mlx":
        from mlx_lm.models import gpt2

        network = gpt2.Model(gpt2.ModelArgs(model_type="gpt2", **shape))
        network.load_weights([(k.replace("transformer.", "model.", 1), mx.array(w)) for k, w in weights.items()])
        return MLXSubject("mlx-lm gpt2", network, config, dtype)
    from mlx_mla import backend_torch

    from transformers import GPT2Config, GPT2LMHeadModel

    reference = GPT2LMHeadModel(GPT2Config(**shape))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out) there
    state = {k: torch.tensor(w.T.copy() if k.endswith(conv1d) else w) for k, w in weights.items()}
    reference.load_state_dict(state, strict=False)
    reference.tie_weights()
    return TorchSubject("transformers GPT-2", reference, config, dtype, backend_torch.TorchBackend(device).device)


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the weights in the compute type."""
    return num_parameters(config) * BYTES[dtype]


def cache_bytes(config: ModelConfig, kind: str, dtype: str) -> int:
    """Bytes of the decoding cache per token of context, all layers."""
    if kind == "none":
        return 0
    if kind == "materialized" and config.attention == "mla":
        keys = config.n_embd + config.n_head * config.qk_rope_head_dim
        return config.n_layer * (keys + config.n_head * (config.v_head_dim or 0)) * BYTES[dtype]
    return cache_bytes_per_token(config, BYTES[dtype])
