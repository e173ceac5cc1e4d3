"""The training step against PyTorch's optimizer, and its variants against each other."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import reference
from helpers import BASE, batch, largest_difference

from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.session import MLXTrainSession
from mlx_mla.errors import UserError
from mlx_mla.model.weights import initial_weights


def session(**changes) -> MLXTrainSession:
    model = changes.pop("model", {})
    config = dataclasses.replace(BASE, **changes)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    return get_backend("mlx").train_session(config, Start(initial_weights(config.model, 0, 0.1)))


def test_loss_is_the_cross_entropy_of_the_formulas():
    s = session()
    x, y = batch(0)
    expected = 0.0
    for ids, targets in zip(x, y):
        z = reference.logits(ids, s.weights(), BASE.model)
        expected += (np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), targets]).sum()
    assert s.loss_sum((x, y)) == pytest.approx(expected, rel=1e-5)
    assert s.step(0, 0.0, [(x, y)]).loss == pytest.approx(expected / y.size, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_step_is_torchs_adamw(clip):
    """Same gradients into torch.optim.AdamW: the same weights, over several steps."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(BASE, grad_clip=clip)
    s = get_backend("mlx").train_session(config, Start(initial_weights(config.model, 0, 0.1)))
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in s.weights().items()}
    decayed = [p for p in params.values() if p.ndim >= 2]
    others = [p for p in params.values() if p.ndim < 2]
    theirs = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=(config.beta1, config.beta2),
        eps=config.adam_epsilon,
    )
    for step in range(5):
        lr = 1e-2 / (step + 1)
        x, y = batch(step)
        _, grads = s._loss_and_grad(mx.array(x), mx.array(y))
        from mlx.utils import tree_flatten

        for name, grad in tree_flatten(grads):
            params[name].grad = torch.tensor(np.array(grad))
        norm = torch.nn.utils.clip_grad_norm_(params.values(), clip or float("inf"))
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        result = s.step(step, lr, [(x, y)])
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        for name, w in s.weights().items():
            np.testing.assert_allclose(
                w, params[name].detach().numpy(), atol=2e-6, err_msg=f"{name}, step {step}"
            )


def test_accumulating_half_batches_is_one_whole_batch():
    whole, halves = session(), session()
    for step in range(3):
        x, y = batch(step)
        a = whole.step(step, 1e-2, [(x, y)])
        b = halves.step(step, 1e-2, [(x[:2], y[:2]), (x[2:], y[2:])])
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    assert largest_difference(whole, halves) < 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_step_is_the_eager_step(dropout):
    eager, compiled = (
        session(model={"dropout": dropout}),
        session(compile=True, model={"dropout": dropout}),
    )
    for step in range(3):
        # A new learning rate each step: a compiled constant would show.
        a, b = (s.step(step, 1e-2 / (step + 1), [batch(step)]) for s in (eager, compiled))
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
    assert largest_difference(eager, compiled) < 1e-4


def test_dropout_is_a_function_of_seed_and_step():
    a, b, c = (session(model={"dropout": 0.3}, seed=seed) for seed in (1, 1, 2))
    losses = [[s.step(step, 0.0, [batch(0)]).loss for step in (0, 1)] for s in (a, b, c)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert losses[0][0] != losses[0][1]
    # Validation is without it.
    assert a.loss_sum(batch(0)) == pytest.approx(session().loss_sum(batch(0)), rel=1e-6)


def test_bfloat16_keeps_float32_weights_and_learns():
    s = session(dtype="bfloat16")
    first = s.step(0, 1e-2, [batch(0)]).loss
    for step in range(1, 15):
        last = s.step(step, 1e-2, [batch(0)]).loss
    assert last < first - 0.5
    assert {w.dtype for w in s.weights().values()} == {np.dtype(np.float32)}
    assert {v.dtype for v in s.optimizer_state().values()} == {np.dtype(np.float32)}
    # Weights between bfloat16's steps show that the update was not rounded to them.
    w = s.weights()["transformer.h.0.attn.c_attn.weight"]
    assert (w.view(np.uint32) & 0xFFFF).any()
    exact = session().loss_sum(batch(1))
    assert session(dtype="bfloat16").loss_sum(batch(1)) == pytest.approx(exact, rel=0.02)


def test_state_saved_and_loaded_goes_on_identically():
    a = session()
    for step in range(3):
        a.step(step, 1e-2, [batch(step)])
    b = get_backend("mlx").train_session(BASE, Start(a.weights(), 3, a.optimizer_state()))
    for step in range(3, 6):
        assert a.step(step, 1e-2, [batch(step)]) == b.step(step, 1e-2, [batch(step)])
    assert largest_difference(a, b) == 0


def test_an_absent_gpu_is_refused():
    if mx.is_available(mx.gpu):
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="--device gpu: MLX sees no GPU here"):
        get_backend("mlx", "gpu")
