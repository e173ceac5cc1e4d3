"""What is fused on a GPU, in training and in decoding, and that nothing asks Metal for a gradient
that its kernels do not have."""

import mlx.core as mx
import numpy as np
import pytest
from helpers import difference

from mlx_mla import train
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.model import model_mlx
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.fusion import (
    CPU_SHORTEST,
    METAL_SHORTEST,
    METAL_WIDTHS,
    fused_by_mlx,
    fused_by_torch,
)
from mlx_mla.model.model_mlx import FUSED_PAIR, FUSED_SHARED_HEAD, FUSED_WIDTHS, NO_FUSED_GRADIENT
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights


def settings(dtype="float32", context=64, **shape) -> TrainConfig:
    shape = {"n_embd": 128, "n_head": 2, "n_positions": 1024, **shape}
    return TrainConfig(dtype=dtype, seq_len=context, model=ModelConfig(**shape)).resolved()


def test_training_presets_that_metal_fuses():
    assert all(fused_by_mlx("metal", preset(name).resolved()) for name in PRESETS)


@pytest.mark.parametrize(
    ("device", "changes", "fused"),
    [
        ("metal", {}, True),
        ("metal", {"qk_rope_head_dim": 32}, True),  # (96, 64)
        ("metal", {"qk_rope_head_dim": 64}, True),  # (128, 64), padded
        ("metal", {"v_head_dim": 96}, True),  # (64, 96), padded
        ("metal", {"v_head_dim": 100}, False),
        ("metal", {"head_dim": 20, "v_head_dim": 20}, False),
        ("metal", {"head_dim": 192, "v_head_dim": 192}, True),
        ("metal", {"context": 8}, False),
        ("metal", {"context": 9}, True),
        ("cpu", {}, False),
        ("cuda", {}, False),
        ("cuda", {"dtype": "bfloat16", "context": 256}, True),
        ("cuda", {"dtype": "bfloat16", "context": 200}, False),
        ("cuda", {"dtype": "bfloat16", "context": 256, "head_dim": 192}, False),
    ],
)
def test_where_training_keeps_no_scores_in_mlx(device, changes, fused, monkeypatch):
    config = settings(**changes)
    assert fused_by_mlx(device, config) is fused
    backend = MLXBackend("cpu")
    backend.device = mx.Device(mx.cpu if device == "cpu" else mx.gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: device == "metal")
    assert backend.fused_attention(config) is fused


@pytest.mark.torch
@pytest.mark.parametrize("context", [16, 31, 32])
@pytest.mark.parametrize(
    "shape", [{}, {"qk_rope_head_dim": 32}, {"head_dim": 20}, {"v_head_dim": 96}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_pytorch_keeps_no_scores_on_the_cpu(context, shape, dtype, monkeypatch):
    """By its own choice of a kernel: 0 is the one of products and a softmax."""
    import torch

    from mlx_mla.model import model_torch

    config = settings(context=context, **shape)
    keys, values = config.model.attention_spec.head_widths
    q, k, v = (
        torch.randn(2, 2, context, w, dtype=getattr(torch, dtype), requires_grad=True)
        for w in (keys, keys, values)
    )
    chosen = []

    def spy(*args, is_causal, **kwargs):
        chosen.append(torch._fused_sdp_choice(*args[:3], is_causal=is_causal))
        return attention(*args, is_causal=is_causal, **kwargs)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model_torch.attend(q, k, v, None, 1.0)
    assert [fused_by_torch("cpu", config)] == [choice != 0 for choice in chosen]


@pytest.mark.torch
def test_the_models_agree_on_the_fewest_queries_that_are_padded():
    from mlx_mla.model import model_torch

    assert CPU_SHORTEST == model_torch.FUSED_QUERIES


def test_a_dry_run_says_where_attention_is_fused(capsys):
    for widths, where in (("64", "(Metal, CUDA)"), ("104", "(CUDA)")):
        asked = ["--dry-run", "--preset", "mla-124m", "--v-head-dim", widths]
        assert train.main(asked) == 0
        row = next(r for r in capsys.readouterr().out.splitlines() if "fused SDPA" in r)
        assert row.endswith(where)


# --- gradients of short sequences ---


@pytest.fixture
def metal(monkeypatch):
    """A GPU whose fused attention has no gradient for few queries, unless an array is the mask."""
    monkeypatch.setattr(model_mlx, "on_metal", lambda: True)
    attention = mx.fast.scaled_dot_product_attention

    def fused(q, k, v, *, scale, mask=None, **kwargs):
        if q.shape[2] <= NO_FUSED_GRADIENT and not isinstance(mask, mx.array):
            raise RuntimeError("[ScaledDotProductAttentionVJP] NYI")
        return attention(q, k, v, scale=scale, mask=mask, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fused)


def steps(context: int, every: int, **shape) -> list[float]:
    config = TrainConfig(
        batch_size=2,
        seq_len=context,
        activation_checkpointing=every,
        compile=False,
        model=ModelConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, **shape),
    ).resolved()
    start = Start(initial_weights(config.model, 0))
    session = MLXBackend("cpu").train_session(config, start)
    x = np.arange(2 * context, dtype=np.int32).reshape(2, context)
    return [session.step(i, 1e-2, [(x, x + 1)]).loss for i in range(3)]


@pytest.mark.parametrize("context", [1, 2, NO_FUSED_GRADIENT, METAL_SHORTEST])
@pytest.mark.parametrize("every", [0, 1], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    "shape",
    [
        {"qk_rope_head_dim": 4},
        {"qk_rope_head_dim": 4, "attention_k_eq_v": True, "kv_lora_rank": 16},
        {"attention": "mha"},
    ],
    ids=str,
)
def test_short_sequences_train_on_metal(context, every, shape, request):
    expected = steps(context, every, **shape)
    request.getfixturevalue("metal")
    assert steps(context, every, **shape) == expected


def test_the_tables_agree_on_what_metal_fuses():
    assert METAL_SHORTEST == NO_FUSED_GRADIENT + 1
    assert METAL_WIDTHS == FUSED_WIDTHS
    assert max(FUSED_PAIR) in METAL_WIDTHS


@pytest.mark.parametrize("context", [NO_FUSED_GRADIENT, METAL_SHORTEST])
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ({"qk_rope_head_dim": 48}, (64, 64)),
        ({"v_head_dim": 64}, (64, 64)),
        ({"attention_k_eq_v": True, "kv_lora_rank": 64, "qk_rope_head_dim": 32}, FUSED_PAIR),
        ({"attention_k_eq_v": True, "kv_lora_rank": 64, "qk_rope_head_dim": 16}, (80, 80)),
        ({"attention_k_eq_v": True, "kv_lora_rank": 64, "qk_rope_head_dim": 48}, None),
        ({"qk_rope_head_dim": 4}, None),
        ({"attention": "mha"}, None),
    ],
    ids=str,
)
def test_metal_is_given_widths_that_it_fuses_and_learns_the_same(
    context, shape, widths, request, monkeypatch
):
    expected = steps(context, 0, **shape)
    request.getfixturevalue("metal")
    attention, seen = mx.fast.scaled_dot_product_attention, set()

    def spy(q, k, v, **kwargs):
        seen.add((k.shape[-1], v.shape[-1]))
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    assert steps(context, 0, **shape) == pytest.approx(expected, rel=1e-6)
    own = TrainConfig(model=ModelConfig(n_head=2, n_embd=32, **shape)).resolved()
    few = context <= NO_FUSED_GRADIENT
    assert seen == {widths if widths and not few else own.model.attention_spec.head_widths}


# --- decoding ---


def decoded_widths(name: str) -> set[tuple[int, int]]:
    """Widths of the keys and the values that a preset's steps read."""
    kind = preset(name).resolved().model.attention_spec
    if not kind.latent_widths:
        return {kind.head_widths}
    return {(width, rank) for width, rank in zip(kind.latent_widths, kind.latent_ranks)}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_decode_with_widths_that_metal_fuses(name):
    # The original's latent has no kernel: product, softmax, product.
    unfused = {"mla-124m": {(384, 384)}}.get(name, set())
    assert decoded_widths(name) - FUSED_SHARED_HEAD == unfused


@pytest.mark.skipif(not mx.metal.is_available(), reason="Metal's kernels")
@pytest.mark.parametrize(("heads", "length"), [(1, 1), (12, 1), (12, 2), (2, 8), (32, 1)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("widths", sorted(FUSED_SHARED_HEAD), ids=str)
def test_every_shared_head_is_fused_on_metal(widths, dtype, heads, length):
    """`force_fused` raises where there is no kernel."""
    keys, rank = widths
    q, k = (
        mx.random.normal(shape, key=mx.random.key(i)).astype(dtype)
        for i, shape in enumerate([(1, heads, length, keys), (1, 1, 300, keys)])
    )
    mask = "causal" if length > 1 else None
    arguments = {"scale": keys**-0.5, "mask": mask}
    got = mx.fast.scaled_dot_product_attention(
        q, k, k[..., :rank], force_fused=True, stream=mx.gpu, **arguments
    )
    q, k = q.astype(mx.float32), k.astype(mx.float32)
    expected = mx.fast.scaled_dot_product_attention(q, k, k[..., :rank], stream=mx.cpu, **arguments)
    assert difference(got, expected) < (2e-3 if dtype == mx.float32 else 2e-2)


def test_this_mlx_can_be_asked_for_a_fused_kernel():
    """What the test above relies on; on a CPU nothing is fused."""
    q = mx.zeros((1, 1, 1, 64))
    with pytest.raises(ValueError, match="force_fused"):
        mx.eval(
            mx.fast.scaled_dot_product_attention(
                q, q, q, scale=1.0, force_fused=True, stream=mx.cpu
            )
        )
