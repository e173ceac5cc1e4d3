"""What saves memory changes no gradient: the loss in chunks, and gradient checkpointing, in both
backends."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx
import numpy as np
from helpers import BASE, batch, largest_difference
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx import loss as loss_mlx
from mlx_mla.backends.torch import loss as loss_torch
from mlx_mla.model.presets import preset
from mlx_mla.model.weights import initial_weights


def float64_gradients(h, w, y):
    """Summed cross-entropy and its gradients, from the formulas."""
    z = h.astype(np.float64) @ w.T.astype(np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).sum()
    p[np.arange(len(y)), y] -= 1
    return loss, p @ w, p.T @ h


@given(
    tokens=st.integers(1, 30), width=st.integers(1, 9), ids=st.integers(2, 40),
    chunk=st.integers(0, 35), scale=st.floats(-2, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_loss_in_chunks_has_the_gradients_of_the_formula(
    tokens, width, ids, chunk, scale, seed
):
    rng = np.random.default_rng(seed)
    h, w = (rng.standard_normal((n, width)).astype(np.float32) for n in (tokens, ids))
    y = rng.integers(0, ids, tokens)
    loss, dh, dw = float64_gradients(h, w, y)

    def scaled(a, b):
        return scale * loss_mlx.head_loss(a[None], b, mx.array(y)[None], chunk, gradient=True)

    got, grads = mx.value_and_grad(scaled, argnums=(0, 1))(mx.array(h), mx.array(w))
    plain = loss_mlx.head_loss(mx.array(h)[None], mx.array(w), mx.array(y)[None], chunk)
    a, b = (torch.tensor(t, requires_grad=True) for t in (h, w))
    theirs = scale * loss_torch.head_loss(a[None], b, torch.tensor(y), chunk)
    theirs.backward()
    for value in (got.item(), theirs.item(), scale * plain.item()):
        assert value == pytest.approx(scale * loss, rel=1e-5, abs=1e-5)
    for found, expected in ((grads[0], dh), (grads[1], dw), (a.grad, dh), (b.grad, dw)):
        np.testing.assert_allclose(np.asarray(found.tolist()), scale * expected, atol=1e-5)


def session(backend: str, **changes):
    model = dataclasses.replace(BASE.model, **changes.pop("model", {}))
    config = dataclasses.replace(BASE, model=model, **changes)
    return get_backend(backend).train_session(config, Start(initial_weights(config.model, 0, 0.1)))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize(
    "model",
    [
        {"n_layer": 3},
        {"n_layer": 3, "num_kv_shared_layers": 2},
        {"n_layer": 3, "attention": "mha", "qk_rope_head_dim": 0},
    ],
)
def test_checkpointing_and_chunks_change_no_step(backend, every, model):
    plain = session(backend, model=model)
    saving = session(
        backend, model=model, activation_checkpointing=every, loss_chunk=7, compile=True
    )
    for step in range(3):
        a, b = (s.step(step, 1e-2, [batch(step), batch(step + 9)]) for s in (plain, saving))
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    weights = (plain.weights(), saving.weights())
    for name, w in weights[0].items():
        # The key bias has no gradient but rounding, which Adam blows up.
        assert np.abs(w - weights[1][name]).max() < (
            0.05 if name.endswith("c_attn.bias") else 1e-3
        ), name
    assert plain.loss_sum(batch(5)) == pytest.approx(saving.loss_sum(batch(5)), rel=1e-4)


@pytest.mark.parametrize(("backend", "compiled"), [("mlx", False), ("mlx", True), ("torch", False)])
def test_what_is_computed_again_drops_the_same_values(backend, compiled):
    """Dropout without a change of the weights: the loss along the gradient changes as the gradient
    says."""
    model = dataclasses.replace(BASE.model, dropout=0.4)
    config = dataclasses.replace(
        BASE, model=model, activation_checkpointing=1, weight_decay=0.0, grad_clip=0.0,
        compile=compiled,
    )  # fmt: skip
    weights = initial_weights(config.model, 0, 0.1)

    def start(w):
        return get_backend(backend).train_session(config, Start(w))

    first = start(weights)
    norm = first.step(0, 0.0, [batch(0)])
    # With one step behind it AdamW's mean gradient is (1 - beta1) times the gradient.
    gradient = {
        k.removeprefix("exp_avg."): v / (1 - config.beta1)
        for k, v in first.optimizer_state().items()
        if k.startswith("exp_avg.")
    }
    length = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
    assert length == pytest.approx(norm.grad_norm, rel=1e-4)
    losses = []
    for sign in (-1, 1):  # the same step number: the same masks
        moved = {k: w + np.float32(sign * 1e-3 / length) * gradient[k] for k, w in weights.items()}
        losses.append(start(moved).step(0, 0.0, [batch(0)]).loss)
    assert (losses[1] - losses[0]) / 2e-3 == pytest.approx(norm.grad_norm, rel=0.01)


def test_large_logits_are_taken_in_chunks_by_themselves():
    assert preset("mla-124m").resolved().loss_chunk == 1024
    assert preset("nano").resolved().loss_chunk == 0
    assert dataclasses.replace(preset("mla-124m"), loss_chunk=0).resolved().loss_chunk == 0


def test_chunks_and_checkpoints_need_less_memory():
    """At a vocabulary of GPT-2's proportions: MLX's own peak, its execution kept from running
    ahead."""
    if mx.is_available(mx.gpu):
        pytest.skip("made for CPUs, whose memory limit keeps execution in order")
    config = dataclasses.replace(
        BASE, model=dataclasses.replace(BASE.model, n_layer=6, vocab_size=8000)
    )
    rows = np.random.default_rng(0).integers(0, 8000, (32, 25)).astype(np.int32)
    peaks = []
    before = mx.set_memory_limit(1)
    try:
        for changes in ({}, {"loss_chunk": 80}, {"loss_chunk": 80, "activation_checkpointing": 1}):
            s = get_backend("mlx").train_session(
                dataclasses.replace(config, **changes), Start(initial_weights(config.model, 0))
            )
            mx.clear_cache()
            base = mx.get_active_memory()
            mx.reset_peak_memory()
            s.step(0, 1e-3, [(rows[:, :-1], rows[:, 1:])])
            peaks.append(mx.get_peak_memory() - base)
            del s
    finally:
        mx.set_memory_limit(before)
    logits = 4 * 32 * 24 * 8000
    assert peaks[1] < peaks[0] - logits
    assert peaks[2] < 0.8 * peaks[1]


def test_sessions_agree_across_backends_with_everything_on():
    changes = {"activation_checkpointing": 2, "loss_chunk": 11, "optimizer": "adamw"}
    a, b = session("mlx", **changes), session("torch", **changes)
    for step in range(3):
        for s in (a, b):
            s.step(step, 1e-2, [batch(step)])
    assert largest_difference(a, b) < 1e-3
