"""Metal's fused attention kernels, which `mlx_mla.model.model_mlx` counts on by their widths."""

from pathlib import Path

import numpy as np

from mlx_mla.backends.mlx.load import load  # isort: skip  (loads MLX's BLAS before MLX)
from mlx_mla.checks.models import small_model
from mlx_mla.checks.row import Outcome, at_most, together
from mlx_mla.model import model_mlx
from mlx_mla.model.model_mlx import FUSED_SHARED_HEAD, Model
from mlx_mla.model.presets import PRESETS, preset

import mlx.core as mx  # isort: skip  (after the backend, which loads its BLAS)
from mlx_lm.models.cache import make_prompt_cache  # isort: skip

LENGTH = 200  # of the cache; not a multiple of any block
# Of numbers of size 1 that were rounded once, relative to float64.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 4e-2}
RECOMMENDED = ("nano", "mla-124m-rope", "mla-124m-tied")
"""Presets whose widths were chosen for fused decoding."""


def shared_head() -> Outcome:
    """Every entry of FUSED_SHARED_HEAD, forced to be fused, against numpy in float64; and that the
    presets made for it are among them."""
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        worst = max(
            difference(keys, values, queries, dtype)
            for keys, values in sorted(FUSED_SHARED_HEAD)
            for queries in (1, 4)
        )
        found[str(dtype)] = at_most(worst, tolerance, "off by")
    for name in RECOMMENDED:
        assert name in PRESETS
        model = preset(name).resolved().model
        assert model.kv_lora_rank
        widths = (model.kv_lora_rank + model.qk_rope_head_dim, model.kv_lora_rank)
        found[name] = Outcome(widths in FUSED_SHARED_HEAD, f"decodes with widths {widths}")
    return together(found)


def both_paths(place: Path) -> Outcome:
    """Logits of a token and of four after a cached prompt, fused and not, at presets' widths."""
    ids = mx.array(np.random.default_rng(0).integers(0, 257, (2, 40)))
    found = {}
    for name in RECOMMENDED:
        model = load(small_model(place / name, name))
        fused, unfused = (_decoded(model, ids, widths) for widths in (FUSED_SHARED_HEAD, set()))
        found[name] = at_most(float(np.abs(fused - unfused).max()), 1e-3, "logits differ by")
    return together(found)


def _decoded(model: Model, ids: mx.array, fused: set[tuple[int, int]]) -> np.ndarray:
    """Logits after a prompt's cache, with these widths for fused ones."""
    cache, before = make_prompt_cache(model), model_mlx.FUSED_SHARED_HEAD
    model_mlx.FUSED_SHARED_HEAD = fused
    try:
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 32), (32, 33), (33, 37))]
        mx.eval(parts)
    finally:
        model_mlx.FUSED_SHARED_HEAD = before
    return np.array(mx.concatenate(parts, axis=1))


def difference(keys: int, values: int, queries: int, dtype: mx.Dtype) -> float:
    """Largest error of attention by 8 heads on one shared head, relative to the largest result.

    Args:
        keys, values: Widths; the values are the first part of the keys, as latents are.
        queries: Of each head.
    """
    random = np.random.default_rng(0)
    q = mx.array(random.standard_normal((2, 8, queries, keys), np.float32)).astype(dtype)
    k = mx.array(random.standard_normal((2, 1, LENGTH, keys), np.float32)).astype(dtype)
    v = k[..., :values]
    mask = "causal" if queries > 1 else None
    scale = keys**-0.5
    out = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=scale, mask=mask, force_fused=mx.metal.is_available()
    )
    exact_q, exact_k, exact_v, found = (
        np.array(a.astype(mx.float32)).astype(np.float64) for a in (q, k, v, out)
    )
    scores = scale * exact_q @ exact_k.swapaxes(-1, -2)
    if queries > 1:
        scores[:, :, ~np.tri(queries, LENGTH, LENGTH - queries, bool)] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = shares / shares.sum(-1, keepdims=True) @ exact_v
    return float(np.abs(found - expected).max() / np.abs(expected).max())
