"""Metal's fused attention kernels, which `mlx_mla.model.model_mlx` counts on by their widths."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlx_mla.checks.models import small_model
from mlx_mla.checks.row import Outcome, at_most, row
from mlx_mla.model.presets import preset

if TYPE_CHECKING:
    from mlx_mla.model.model_mlx import Model

LENGTH = 200  # of the cache; not a multiple of any block
# Of numbers of size 1 that were rounded once, relative to float64.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
RECOMMENDED = ("nano", "mla-124m-rope", "mla-124m-tied")
"""Presets whose widths were chosen for fused decoding."""


@row(
    where=("mlx_mla/model/model_mlx.py:FUSED_SHARED_HEAD",),
    needs=("metal",),
    expected="fused at all of them, and exact to the type's rounding; the same logits to 1e-3",
    minutes=0.1,
)
def fused_decoding(place: Path) -> Iterator[Outcome]:
    """Fused decoding: latents as one shared key head of Metal's decode kernel, at every width that
    counts on it, in three types; and in the model, logits through the fused and the unfused
    path."""
    from mlx_mla.backends.mlx.load import load
    from mlx_mla.model.model_mlx import FUSED_SHARED_HEAD

    for dtype, tolerance in TOLERANCE.items():
        for keys, values in sorted(FUSED_SHARED_HEAD):
            for queries in (1, 4):
                off = difference(keys, values, queries, dtype)
                yield at_most(off, tolerance, f"{dtype} off by", f"{queries} x {keys}/{values}")
    for name in RECOMMENDED:
        config = preset(name).resolved().model
        assert config.kv_lora_rank
        widths = (config.kv_lora_rank + config.qk_rope_head_dim, config.kv_lora_rank)
        yield Outcome(widths in FUSED_SHARED_HEAD, f"{name} decodes with widths {widths}")
        model = load(small_model(place / name, name))
        fused, unfused = (_decoded(model, widths) for widths in (FUSED_SHARED_HEAD, set()))
        yield at_most(np.abs(fused - unfused).max(), 1e-3, "logits differ by", name)


def _decoded(model: "Model", fused: set[tuple[int, int]]) -> np.ndarray:
    """Logits of a token and of four after a cached prompt, with these widths for fused ones."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_mla.model import model_mlx

    ids = mx.array(np.random.default_rng(0).integers(0, 257, (2, 40)))
    cache, before = make_prompt_cache(model), model_mlx.FUSED_SHARED_HEAD
    model_mlx.FUSED_SHARED_HEAD = fused
    try:
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 32), (32, 33), (33, 37))]
        mx.eval(parts)
    finally:
        model_mlx.FUSED_SHARED_HEAD = before
    return np.array(mx.concatenate(parts, axis=1))


def difference(keys: int, values: int, queries: int, dtype: str) -> float:
    """Largest error of attention by 8 heads on one shared head, relative to the largest result.

    Args:
        keys, values: Widths; the values are the first part of the keys, as latents are.
        queries: Of each head.
    """
    import mlx.core as mx

    random = np.random.default_rng(0)
    q, k = (
        mx.array(random.standard_normal(shape, np.float32)).astype(getattr(mx, dtype))
        for shape in ((2, 8, queries, keys), (2, 1, LENGTH, keys))
    )
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
