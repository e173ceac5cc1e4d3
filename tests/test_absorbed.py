"""Several queries on latents as they are (absorbed), against the full forward: the choice, the
masks, the caches."""

from unittest import mock

import mlx.core as mx
import pytest
from helpers import TOLERANCE, difference, in_chunks, model_configs, random_weights, token_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from mlx_mla.backends.mlx.caches import QuantizedKVCache
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.model import model_mlx
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.presets import preset


def absorb(on: bool):
    """Every cached step absorbed, or none, whatever is cheaper."""
    return mock.patch.object(model_mlx.LatentAttention, "_absorbing_is_cheaper", lambda *_: on)


def latent_model(**shape) -> tuple[ModelConfig, model_mlx.Model]:
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 96, "vocab_size": 30, **shape}
    config = ModelConfig(**shape).resolved()
    return config, build_model(config, random_weights(config, 1))


@given(
    config=model_configs(),
    batch=st.integers(1, 3),
    length=st.integers(2, 90),
    chunks=st.lists(st.integers(2, 40), min_size=1, max_size=5),
)
@settings(max_examples=30)
def test_absorbed_chunks_give_the_logits_of_the_full_forward(config, batch, length, chunks):
    model = build_model(config, random_weights(config, length))
    x = token_ids(config, batch, length)
    with absorb(True):
        got = in_chunks(model, x, chunks, make_prompt_cache(model))
    assert difference(got, model(x)) <= TOLERANCE


@pytest.mark.parametrize("rope", [0, 8])
@given(
    padding=st.lists(st.integers(0, 20), min_size=2, max_size=3),
    chunks=st.lists(st.integers(2, 20), max_size=3),
)
@settings(max_examples=8)
def test_absorbed_chunks_of_a_left_padded_batch(rope, padding, chunks):
    config, model = latent_model(qk_rope_head_dim=rope)
    width = 40
    rows = [token_ids(config, 1, width - p, p) for p in padding]
    x = mx.concatenate([mx.pad(row, [(0, 0), (p, 0)]) for row, p in zip(rows, padding)])
    with absorb(True):
        got = in_chunks(model, x, chunks, [BatchKVCache(padding) for _ in model.layers])
    for i, (row, p) in enumerate(zip(rows, padding)):
        assert difference(got[i : i + 1, p:], model(row)) <= TOLERANCE


@pytest.mark.parametrize("rope", [0, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_absorbed_and_expanded_read_a_quantized_cache_alike(rope, bits):
    # One layer: in a second, a difference in the last bit may round to another code.
    config, model = latent_model(n_layer=1, n_embd=128, kv_lora_rank=64, qk_rope_head_dim=rope)
    x = token_ids(config, 2, 60)
    logits = []
    for on in (True, False):
        with absorb(on):
            cache = [QuantizedKVCache(group_size=32, bits=bits) for _ in model.layers]
            logits.append(in_chunks(model, x, [30, 2, 7, 16], cache))
    assert difference(*logits) <= TOLERANCE


def test_few_queries_on_a_long_cache_are_absorbed_and_prompts_are_not():
    for name in ("mla-124m", "mla-124m-r128"):
        attention = model_mlx.LatentAttention(
            model_mlx.ModelArgs.from_dict(preset(name).resolved().model.to_dict()), 0
        )
        for cached in (500, 1000, 16_000):
            assert all(attention._absorbing_is_cheaper(new, cached + new) for new in (1, 2, 8, 32))
        assert not any(attention._absorbing_is_cheaper(new, new) for new in (64, 512, 1024))
