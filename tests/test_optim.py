"""Muon against its formula and between the backends; schedules and the size of a step."""

import dataclasses

import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx
import numpy as np
from helpers import BASE, TINY, batch, refused, train_command, words
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten

from mlx_mla import train
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.optim import Muon
from mlx_mla.backends.torch.optim import fuses
from mlx_mla.errors import UserError
from mlx_mla.model.presets import preset
from mlx_mla.model.schedule import learning_rate
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights
from mlx_mla.training.metrics import read_metrics

MUON = dataclasses.replace(BASE, optimizer="muon", muon_learning_rate=0.02, grad_clip=0.0)
MATRIX = "transformer.h.1.mlp.c_fc.weight"


def session(backend: str = "mlx", config: TrainConfig = MUON):
    return get_backend(backend).train_session(config, Start(initial_weights(config.model, 0, 0.1)))


def muon(w, gradients, rate, decay, momentum=0.95):
    """Weights after the gradients, in float64, from https://kellerjordan.github.io/posts/muon."""
    v = np.zeros_like(w)
    for g in gradients:
        v = momentum * v + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * v
        tall = x.shape[0] > x.shape[1]
        x = (x.T if tall else x) / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if tall else x
        w = w * (1 - rate * decay) - rate * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x
    return w


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("biases", [True, False])
def test_the_attention_alone_is_trained_by_its_own_gradient(backend, dtype, biases):
    model = dataclasses.replace(BASE.model, attention_bias=biases, attention_out_bias=biases)
    whole = dataclasses.replace(BASE, model=model, dtype=dtype, grad_clip=0.0)
    part = dataclasses.replace(whole, trainable="attention", activation_checkpointing=1)
    full, attention = (session(backend, config) for config in (whole, part))
    before = attention.weights()
    losses = [s.step(0, 1e-2, [batch(0), batch(1)]).loss for s in (full, attention)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    expected, moments = (s.optimizer_state() for s in (full, attention))
    assert moments.keys() == {name for name in expected if ".attn." in name}
    for name, moment in moments.items():
        assert moment == pytest.approx(expected[name], rel=0.02, abs=1e-6), name
    after = attention.weights()
    assert after.keys() == before.keys()
    for name in after:
        assert np.array_equal(after[name], before[name]) == (".attn." not in name), name


def test_muon_is_its_formula_with_decoupled_decay():
    s = session()
    before, gradients = s.weights()[MATRIX].astype(np.float64), []
    for step in range(3):
        x, y = batch(step)
        gradients.append(
            np.array(
                dict(tree_flatten(s._loss_and_grad(mx.array(x), mx.array(y))[1]))[MATRIX],
                np.float64,
            )
        )
        s.step(step, BASE.learning_rate, [(x, y)])
    expected = muon(before, gradients, 0.02, BASE.weight_decay)
    np.testing.assert_allclose(s.weights()[MATRIX], expected, atol=2e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    s = session()
    assert [type(part) for part in s.optimizer.optimizers] == [Muon, AdamW, AdamW]
    s.step(0, 1e-3, [batch(0)])
    names = set(s.weights())
    of_muon = {
        k.removeprefix("momentum_buffer.")
        for k in s.optimizer_state()
        if k.startswith("momentum_buffer.")
    }
    of_adamw = {k.removeprefix("exp_avg.") for k in s.optimizer_state() if k.startswith("exp_avg.")}
    assert of_muon == {n for n, w in s.weights().items() if w.ndim == 2 and "wte" not in n}
    assert of_adamw == names - of_muon


def test_muon_agrees_between_the_backends_and_follows_the_schedule():
    """PyTorch iterates in bfloat16, whose noise stays within some per cent of a step."""
    mlx, torch_ = session("mlx"), session("torch")
    start = mlx.weights()[MATRIX]
    for step in range(3):
        for s in (mlx, torch_):
            s.step(step, 1e-2 / (step + 1), [batch(step)])
    a, b = mlx.weights()[MATRIX] - start, torch_.weights()[MATRIX] - start
    assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(a)
    assert mlx.loss_sum(batch(9)) == pytest.approx(torch_.loss_sum(batch(9)), rel=1e-2)
    still = session()
    still.step(0, 0.0, [batch(0)])
    np.testing.assert_array_equal(still.weights()[MATRIX], start)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_muon_resumes_bit_identically(tmp_path, text_file, backend):
    def run(out, *flags):
        argv = words(
            *TINY, "--data", text_file, "--out", out, "--backend", backend, "--optimizer muon"
        )
        assert train.main([*argv, "--log-every", "1", *flags]) == 0
        return [r["loss"] for r in read_metrics(out / "metrics.jsonl") if r["split"] == "train"]

    expected = run(tmp_path / "straight", "--steps", "8")
    run(tmp_path / "broken", "--steps", "8", "--save-every", "4")
    for file in (tmp_path / "broken/checkpoints/step-000008").iterdir():
        file.unlink()
    (tmp_path / "broken/checkpoints/step-000008").rmdir()
    assert run(tmp_path / "broken", "--steps", "8", "--resume") == expected
    assert expected[-1] < expected[0]


def test_the_optimizer_of_a_run_cannot_change(tiny_run, capsys):
    said = refused(capsys, "--resume", "--out", tiny_run, "--steps", "50", "--optimizer", "muon")
    assert "--optimizer is adamw" in said


def test_adamw_is_fused_where_pytorch_can_and_losses_may_change():
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    fused = {name for name in ("cpu", "cuda", "mps") if fuses(torch.device(name))}
    assert fused == {"cuda", "mps"} <= set(_get_fused_kernels_supported_devices())


def test_fused_adamw_takes_the_same_steps_and_resumes_bit_identically(monkeypatch):
    """On the CPU, as on CUDA and MPS."""
    plain = session("torch", BASE)
    monkeypatch.setattr("mlx_mla.backends.torch.optim.fuses", lambda device: True)
    fused = session("torch", BASE)
    for step in range(3):
        losses = [s.step(step, 1e-2, [batch(step)]).loss for s in (plain, fused)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert [s.optimizers._adamw.param_groups[0]["fused"] for s in (plain, fused)] == [False, True]
    saved = Start(fused.weights(), 3, fused.optimizer_state())
    again = get_backend("torch").train_session(BASE, saved)
    for step in range(3, 6):
        results = [s.step(step, 1e-2, [batch(step)]) for s in (fused, again)]
        assert results[0] == results[1]


def test_warm_up_stable_decay():
    flags = words("--steps 100 --warmup-steps 10 --learning-rate 1 --lr-schedule wsd")
    config = train_command([*flags, "--min-lr-ratio", "0"]).resolved()
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([i / 20 for i in range(20, -1, -1)])
    # A longer run has the same rates until the shorter one decays.
    longer = dataclasses.replace(config, steps=300)
    assert [learning_rate(longer, step) for step in range(81)] == rates[:81]


def test_tokens_of_a_step_decide_the_passes():
    assert preset("mla-124m").resolved().grad_accum_steps == 128
    parsed = train_command(["--preset", "mla-124m", "--batch-size", "8"]).resolved()
    assert (parsed.grad_accum_steps, parsed.step_tokens) == (64, 524288)
    parsed = train_command(["--preset", "mla-124m", "--grad-accum-steps", "2"]).resolved()
    assert (parsed.grad_accum_steps, parsed.tokens_per_step) == (2, 8192)
    parsed = train_command(["--tokens-per-step", "4096"]).resolved()
    assert parsed.grad_accum_steps == 4


def test_settings_that_contradict_each_other(capsys):
    assert "use 2048, or another --batch-size" in refused(capsys, "--tokens-per-step", "2000")
    said = refused(capsys, "--tokens-per-step", "2048", "--grad-accum-steps", "3")
    assert "asks for --grad-accum-steps 2, not 3" in said
    assert "requires --optimizer muon" in refused(capsys, "--muon-learning-rate", "0.1")
    assert "requires --lr-schedule wsd" in refused(capsys, "--decay-fraction", "0.1")
    assert "--loss-chunk must not be negative" in refused(capsys, "--loss-chunk", "-1")
    with pytest.raises(UserError, match="cannot be combined with --teacher"):
        dataclasses.replace(preset("nano"), teacher="x", loss_chunk=5).resolved()
