"""Models in PyTorch: this project's, transformers' own GPT-2, and a plain training loop."""

import contextlib
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from bench.rows import PLAIN, Rates
from bench.subjects.contract import Subject, Timed, Trainer, Weights, gpt2_shape, seconds
from mlx_mla.backends.contract import Start
from mlx_mla.backends.torch.backend import TorchBackend
from mlx_mla.backends.torch.caches import FixedCache, GrowingCache, cache_bytes
from mlx_mla.backends.torch.load import build_model
from mlx_mla.backends.torch.session import TorchTrainSession
from mlx_mla.model.config import DType, ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights


class TorchMemory:
    """See `bench.subjects.contract.Memory`. Create it before the subject.

    MPS keeps no peak: there it is what the driver has given since the subject began to be loaded,
    filling of caches included. On a CPU it is unknown.
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


class TorchSubject(Subject):
    """A model by transformers' contract: ours, or transformers' own."""

    backend = "torch"

    def __init__(
        self, model: str, network: Any, config: ModelConfig, dtype: str, device: torch.device,
        memory: TorchMemory,
    ):  # fmt: skip
        network = network.to(device, getattr(torch, dtype)).eval()
        super().__init__(model, network, config, memory)
        self.device = device
        self.fixed_shapes = device.type == "mps"  # as for `TorchDecoder`

    def logits(self, ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = self.network(self._ids(ids), use_cache=False).logits
            return logits.float().cpu().numpy()

    @torch.inference_mode()
    def forward(self, ids: np.ndarray) -> None:
        self.network(self._ids(ids), use_cache=False)
        _synchronize(self.device)

    @torch.inference_mode()
    def first_token(self, ids: np.ndarray, kind: str) -> None:
        self.use(kind)
        cache = None if kind == "none" else DynamicCache()
        self._next(self._ids(ids[None]), cache, logits_to_keep=1).tolist()

    @torch.inference_mode()
    def decode(self, batch: int, context: int, steps: int, kind: str) -> Timed:
        self.use(kind)
        cache = None if kind == "none" else self._filled(batch, context - 1, steps + 1)
        ids = self._zeros(batch, 1 if cache else context)
        self.memory.reset()
        began = 0.0
        for i in range(steps + 1):
            if i == 1:  # the step before made room in the cache
                began = time.perf_counter()
            if cache is None:  # as the original decodes: the whole context, logits of it all
                ids = torch.cat([ids, self._next(ids, None)], dim=1)
            else:
                mask = self._mask(batch, cache, context + i)
                ids = self._next(ids, cache, attention_mask=mask, logits_to_keep=1)
            ids[:, -1].tolist()  # waits, as `generate` does for every token
        took = time.perf_counter() - began
        return Timed(took, cache_bytes(cache))

    @torch.inference_mode()
    def read_on(self, batch: int, context: int, new: int) -> Timed:
        self.use("latent")
        cache, ids = self._filled(batch, context, new), self._zeros(batch, new)
        self.memory.reset()
        began = time.perf_counter()
        self.network(ids, past_key_values=cache, use_cache=True)
        _synchronize(self.device)
        return Timed(time.perf_counter() - began)

    def _next(self, ids: torch.Tensor, cache: Any, **more: Any) -> torch.Tensor:
        """The greedy tokens (B, 1) after ids (B, T)."""
        out = self.network(ids, past_key_values=cache, use_cache=cache is not None, **more)
        following: torch.Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        return following

    def _mask(self, batch: int, cache: Any, keys: int) -> torch.Tensor | None:
        """What `generate` hides of several prompts: nothing here, where all are as long. A fixed
        cache has a column for every token that it has room for."""
        if batch == 1:
            return None
        return self._zeros(batch, cache.size if isinstance(cache, FixedCache) else keys) + 1

    def _filled(self, batch: int, context: int, new: int) -> Any:
        """The cache that `generate` has on this device for our models, or transformers' for its
        own, with a context in it and room for new tokens."""
        shapes = DynamicCache()
        self.network(self._zeros(1, 1), past_key_values=shapes, use_cache=True)
        cache: Any = DynamicCache()
        if hasattr(self.network, "materialize_cache"):
            fixed = self.fixed_shapes
            cache = FixedCache(self.config.n_layer, context + new) if fixed else GrowingCache()
        for i, layer in enumerate(shapes.layers):
            shape = (batch, layer.keys.shape[1], context)
            arrays = (a.new_full((*shape, a.shape[-1]), 0.01) for a in (layer.keys, layer.values))
            cache.update(*arrays, i)
        _synchronize(self.device)
        return cache

    def _zeros(self, batch: int, length: int) -> torch.Tensor:
        return torch.zeros((batch, length), dtype=torch.long, device=self.device)

    def _ids(self, ids: np.ndarray) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self.device)


class PlainLoop:
    """A training loop such as nanoGPT's, to compare this project's sessions with:
    all logits at once, F.cross_entropy, clipping, torch.optim.AdamW; compiled and fused on CUDA.

    The network is transformers' GPT-2 where the attention is GPT-2's, else this project's.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        weights = initial_weights(config.model, 0)
        self._config, self._device = config, device
        if config.model.beyond_gpt2:
            self._network: Any = build_model(config.model, weights, device)
        else:
            self._network = reference_network(config.model, weights).to(device)
        self._network.train()
        matrices, others = (
            [p for p in self._network.parameters() if (p.ndim >= 2) == is_matrix]
            for is_matrix in (True, False)
        )
        on_cuda = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=1e-4, betas=(config.beta1, config.beta2), fused=on_cuda,
        )  # fmt: skip
        self._forward = torch.compile(self._network) if on_cuda else self._network

    def step(self, step: int, learning_rate: float, batches: Sequence[Any]) -> None:
        """One step on one batch, at a fixed learning rate."""
        ids, targets = (torch.tensor(a, dtype=torch.long, device=self._device) for a in batches[0])
        half = self._config.dtype == "bfloat16"
        autocast = torch.autocast(self._device.type, torch.bfloat16)
        with autocast if half else contextlib.nullcontext():
            logits = self._forward(ids, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._network.parameters(), self._config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        loss.item()


def trainer(config: TrainConfig, device: str, way: str = "") -> Trainer:
    """A training session of this project on random weights; the plain loop if that is the way."""
    place = TorchBackend(device).device
    memory = TorchMemory(place)
    if way == PLAIN:
        return Trainer(config, PlainLoop(config, place), memory)
    session = TorchTrainSession(place, config, Start(initial_weights(config.model, 0)))
    return Trainer(config, session, memory)


def load(
    model: str, config: ModelConfig, weights: Weights, dtype: str, device: str, own: bool = True
) -> TorchSubject:
    """One of this project's models; without `own`, transformers' GPT2LMHeadModel with the weights
    of our MHA model."""
    place = TorchBackend(device).device
    memory = TorchMemory(place)
    network = build_model(config, weights, place) if own else reference_network(config, weights)
    return TorchSubject(model, network, config, dtype, place, memory)


def release() -> None:
    """Free the memory of subjects that nothing refers to any more."""
    gc.collect()
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


def rates(dtype: DType, device: str, side: int) -> Rates:
    """Peak rates of the device, as in mlx.py."""
    backend = TorchBackend(device)
    place = backend.device
    b = torch.full((side, side), 0.5, device=place)
    v, target = torch.full((side,), 0.5, device=place), torch.empty_like(b)

    def best(action: Callable[[], Any]) -> float:
        return min(seconds(lambda: _synchronize(place, action())) for _ in range(5))

    size = b.numel() * b.element_size()
    product = min(best(lambda: b @ v), best(lambda: v @ b))
    memory = max(2 * size / best(lambda: target.copy_(b)), size / product)
    return {"matmul_flops": backend.peak_flops(dtype, seconds=0.2), "memory_bytes": memory}


def _synchronize(device: torch.device, _: Any = None) -> None:
    """Wait until the device has finished."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
