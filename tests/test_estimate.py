"""The figures of --dry-run against counts of the real thing."""

import dataclasses
import gc

from mlx_mla.backend_mlx import MLXTrainSession, build_model
from mlx_mla.config import PRESETS, ModelConfig, preset
from mlx_mla.estimate import cache_bytes_per_token, estimate, forward_flops_per_token
from mlx_mla.weights import initial_weights

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache


@pytest.mark.parametrize("kind", [{"attention": "mha"}, {"kv_lora_rank": 24}, {"qk_rope_head_dim": 8}])
def test_cache_bytes_are_those_of_a_real_cache(kind):
    config = ModelConfig(n_layer=3, n_embd=64, n_head=4, n_positions=512, vocab_size=30, **kind).resolved()
    model = build_model(config, initial_weights(config, 0))
    cache = make_prompt_cache(model)
    # 256 tokens fill the cache's first block exactly, so that nothing of it is spare room.
    mx.eval(model(mx.zeros((1, 256), mx.int32), cache=cache))
    assert sum(c.nbytes for c in cache) == 256 * cache_bytes_per_token(config, 4)


def test_cache_bytes_of_the_presets():
    per_layer = {
        name: cache_bytes_per_token(c.model, 2) // c.model.n_layer
        for name in PRESETS
        if (c := preset(name).resolved(257 if name == "nano" else 50257))
    }
    assert per_layer["gpt2-124m"] == 3072
    assert per_layer["mla-124m"] == 768
    assert per_layer["mla-124m-r256"] == 512
    assert per_layer["mla-124m-r128"] == 256


def test_flops_are_those_of_the_matrix_products():
    c = ModelConfig(n_layer=2, n_embd=64, n_head=4, kv_lora_rank=24, n_positions=32, vocab_size=50).resolved()
    D, R, T = 64, 24, 32
    per_layer = 2 * (D * (D + R) + R * 2 * D + D * D + 2 * D * 4 * D)
    scores = np.mean([2 * 2 * D * keys for keys in range(1, T + 1)])
    assert forward_flops_per_token(c, T) == int(2 * (per_layer + scores) + 2 * 50 * D)


def test_published_ratios_of_forward_flops():
    """The saved FLOPs allow 1.03x at r = 384 and 1.09x at r = 128, head included (T = 512)."""
    mha, r384, r128 = (
        forward_flops_per_token(preset(p).resolved(50257).model, 512)
        for p in ("gpt2-124m", "mla-124m", "mla-124m-r128")
    )
    assert mha / r384 == pytest.approx(1.03, abs=0.005)
    assert mha / r128 == pytest.approx(1.09, abs=0.005)


def test_memory_estimate_adds_up():
    e = estimate(preset("mla-124m").resolved(50257), fused_attention=True)
    n = e.parameters
    assert e.optimizer_bytes == 8 * n
    assert e.weights_bytes == 6 * n  # float32 and a bfloat16 copy
    assert e.total_bytes > 18 * n
    unfused = estimate(preset("mla-124m").resolved(50257), fused_attention=False)
    assert unfused.activation_bytes > e.activation_bytes


@pytest.mark.parametrize("change", [{}, {"n_layer": 6}, {"n_inner": 1024}, {"vocab_size": 4000}, {"n_head": 4}])
def test_memory_estimate_is_near_the_measured_peak(change):
    """Within a quarter, for compiled steps on a CPU, where it was fitted."""
    if mx.is_available(mx.gpu):
        pytest.skip("fitted on CPUs")
    base = preset("nano")
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, **change)).resolved(257)
    gc.collect()
    before = mx.get_active_memory()  # what other tests left
    session = MLXTrainSession(config, initial_weights(config.model, 0), None, 0)
    x = np.zeros((config.batch_size, config.context), np.int32)
    for step in range(2):
        session.step(step, 1e-4, [(x, x)])
    expected = estimate(config, fused_attention=False).total_bytes
    assert session.peak_memory_bytes() - before == pytest.approx(expected, rel=0.25)
