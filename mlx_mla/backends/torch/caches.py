"""transformers' caches with other allocation: growing in steps, or of a fixed size.

Unlike transformers' own caches, they copy nothing into values of width 0, which not every device
handles.
"""

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

SHAPE_STEP = 256
"""Tokens to which a cache of fixed size is rounded up, so that few shapes are compiled."""


class GrowingLayer(DynamicLayer):
    """A layer's cache that grows by 256 tokens at a time, as in mlx-lm.

    transformers' own cache is copied at every step.
    """

    step = 256

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [key_states[..., :0, :], value_states[..., :0, :]]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if end > self.room[0].shape[-2]:
            size = -(-end // self.step) * self.step
            for i, old in enumerate(self.room):
                new = old.new_empty(*old.shape[:-2], size, old.shape[-1])
                if begin and old.shape[-1]:
                    new[..., :begin, :] = old[..., :begin, :]
                self.room[i] = new
        for room, states in zip(self.room, (key_states, value_states)):
            if states.shape[-1]:
                room[..., begin:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


class GrowingCache(Cache):
    """transformers' cache of growing layers. Decoding neither crops nor reorders it."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)


class FixedLayer(StaticLayer):
    """A layer's cache of a fixed size, whose length is known without reading from the device."""

    length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[-2]
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            if states.shape[-1]:
                held[..., begin : self.length, :] = states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


class FixedCache(Cache):
    """transformers' cache of fixed layers, with room for `tokens` tokens or a few more."""

    def __init__(self, layers: int, tokens: int) -> None:
        self.size = -(-tokens // SHAPE_STEP) * SHAPE_STEP
        super().__init__(layers=[FixedLayer(self.size) for _ in range(layers)])


def cache_bytes(cache: Cache | None) -> int:
    """Bytes of the keys and values that a cache holds, with all the room of a fixed one."""
    if cache is None:
        return 0
    return sum(
        t.numel() * t.element_size()
        for layer in cache.layers
        if layer.is_initialized  # layers may share a cache
        for t in (layer.keys, layer.values)
    )
