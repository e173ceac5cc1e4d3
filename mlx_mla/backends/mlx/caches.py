"""mlx-lm's caches, extended to values of width 0."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models import cache as stock


class QuantizedKVCache(stock.QuantizedKVCache):
    """mlx-lm's quantized cache; see `KVCache`."""

    keys: Any
    values: Any
    offset: int

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        if values.shape[-1]:
            return super().update_and_fetch(keys, values)
        new = mx.quantize(keys, group_size=self.group_size, bits=self.bits)
        begin, end = self.offset, self.offset + keys.shape[2]
        if self.keys is None or end > self.keys[0].shape[2]:
            size = -(-end // self.step) * self.step
            held = self.keys or [part[..., :0, :] for part in new]
            self.keys = tuple(_grown(part[..., :begin, :], size) for part in held)
        for held, part in zip(self.keys, new):
            held[..., begin:end, :] = part
        self.offset, self.values = end, _none_beside(self.keys)
        return tree_map(lambda part: part[..., :end, :], (self.keys, self.values))


class KVCache(stock.KVCache):
    """mlx-lm's cache, which does not quantize values of width 0, as they occur beside latents.

    On Metal, MLX's quantizer does not handle empty arrays (0.32). Both classes have mlx-lm's names,
    since prompt cache files store them.
    """

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        quantized = QuantizedKVCache(group_size=group_size, bits=bits)
        quantized.offset = self.offset
        if self.keys is not None:
            both = [self.keys, self.values] if self.values.shape[-1] else [self.keys]
            quantized.keys, *rest = (
                mx.quantize(part, group_size=group_size, bits=bits) for part in both
            )
            quantized.values = rest[0] if rest else _none_beside(quantized.keys)
        return quantized


class UnusedCache(KVCache):
    """An empty placeholder in mlx-lm's list, for a layer without its own cache."""

    state: Any = ()


def make_cache(model: Any) -> list[Any]:
    """Like mlx-lm's `make_prompt_cache`, with the classes of this module."""
    return [adopt(cache) for cache in stock.make_prompt_cache(model)]


def adopt(cache: Any) -> Any:
    """Convert an mlx-lm cache to a class of this module, with the same arrays.

    A cache of any other class is returned unchanged.
    """
    own = {stock.KVCache: KVCache, stock.QuantizedKVCache: QuantizedKVCache}.get(type(cache))
    if own is None:
        return cache
    adopted = own.__new__(own)
    vars(adopted).update(vars(cache))
    return adopted


def _grown(part: mx.array, size: int) -> mx.array:
    """Extend an array of a cache to hold `size` tokens."""
    room = mx.zeros((*part.shape[:2], size - part.shape[2], part.shape[3]), part.dtype)
    return mx.concatenate([part, room], axis=2)


def _none_beside(keys: Any) -> Any:
    """Quantized values of width 0: empty codes, scales and biases."""
    return tuple(part[..., :0] for part in keys)
