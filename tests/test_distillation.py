"""Training with --teacher: the divergence is the textbook's in both backends, and nothing is
ignored."""

import dataclasses
import json

import pytest

torch = pytest.importorskip("torch")

import mlx.core as mx
import numpy as np
from helpers import BASE, TINY, batch, refused, words
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla import checkpoint, train
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start, Teacher
from mlx_mla.backends.mlx.session import distillation_divergence as divergence_mlx
from mlx_mla.backends.torch.session import distillation_divergence as divergence_torch
from mlx_mla.model.weights import initial_weights


@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    temperature=st.floats(0.3, 8),
    spread=st.floats(0, 20),
    seed=st.integers(0, 99),
)
def test_divergence_is_that_of_the_formula_in_float64(
    tokens, vocabulary, temperature, spread, seed
):
    rng = np.random.default_rng(seed)
    student, teacher = (
        rng.normal(0, spread, (tokens, vocabulary)).astype(np.float32) for _ in range(2)
    )
    z = np.stack([teacher, student]).astype(np.float64) / temperature
    log_p, log_q = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    expected = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    close = pytest.approx(expected, rel=1e-4, abs=1e-4 * temperature**2)
    assert (
        divergence_torch(torch.tensor(student), torch.tensor(teacher), temperature).item() == close
    )
    assert divergence_mlx(mx.array(student), mx.array(teacher), temperature).item() == close


def taught(weight, temperature=1.0, **changes):
    return dataclasses.replace(
        BASE, teacher="set below", teacher_weight=weight, teacher_temperature=temperature, **changes
    )


def sessions(config, teacher, weights=None):
    weights = initial_weights(config.model, 0, 0.1) if weights is None else weights
    return [
        get_backend(name).train_session(config, Start(weights), teacher)
        for name in ("mlx", "torch")
    ]


def other_teacher(seed=1):
    """Another kind of attention, other dropout, and more rows of vocabulary than the student."""
    shape = dataclasses.replace(
        BASE.model, attention="mha", qk_rope_head_dim=0, kv_lora_rank=None, v_head_dim=None,
        dropout=0.5, attention_bias=True, vocab_size=64,
    )  # fmt: skip
    return Teacher(shape, initial_weights(shape, seed, 0.2), 60)


def test_backends_agree_over_accumulated_steps():
    mlx, torch_ = sessions(taught(0.7, 2.0), other_teacher())
    for step in range(6):
        batches = [batch(2 * step, 2), batch(2 * step + 1, 2)]
        a, b = (s.step(step, 1e-3, batches) for s in (mlx, torch_))
        assert a.loss == pytest.approx(b.loss, abs=1e-4), f"step {step}"
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


@pytest.mark.parametrize("backend", [0, 1])
def test_a_model_learns_nothing_from_itself(backend):
    weights = initial_weights(BASE.model, 0, 0.1)
    config = taught(1.0, 3.0)
    result = sessions(config, Teacher(config.model, weights, 60), weights)[backend].step(
        0, 1e-3, [batch(0)]
    )
    assert result.loss == pytest.approx(0, abs=1e-5)
    assert result.grad_norm == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("backend", [0, 1])
def test_a_teacher_without_weight_changes_nothing(backend):
    plain, with_teacher = (
        sessions(c, t)[backend] for c, t in ((BASE, None), (taught(0.0), other_teacher()))
    )
    for step in range(3):
        a, b = (s.step(step, 1e-3, [batch(step)]) for s in (plain, with_teacher))
        assert a.loss == pytest.approx(b.loss, abs=1e-6)
    # Validation is of the text, whatever the training minimizes.
    assert plain.loss_sum(batch(9)) == pytest.approx(with_teacher.loss_sum(batch(9)), rel=1e-5)


@pytest.mark.parametrize("backend", [0, 1])
def test_rows_of_padding_teach_nothing(backend):
    teacher = other_teacher()
    head = "transformer.wte.weight"
    loud = {**teacher.weights, head: teacher.weights[head].copy()}
    loud[head][60:] = 50.0
    losses = [
        sessions(taught(1.0), dataclasses.replace(teacher, weights=w))[backend]
        .step(0, 1e-3, [batch(0)])
        .loss
        for w in (teacher.weights, loud)
    ]
    assert losses[0] == losses[1]


def test_the_compiled_step_is_the_eager_one():
    eager, compiled = (sessions(taught(0.5, compile=c), other_teacher())[0] for c in (False, True))
    for step in range(3):
        a, b = (s.step(step, 1e-3, [batch(step)]) for s in (eager, compiled))
        assert a.loss == pytest.approx(b.loss, abs=1e-5)


def flags(tiny_run, text_file, *more):
    return words(
        *TINY[-9:], "--data", text_file, "--init", tiny_run, "--teacher", tiny_run,
        "--eval-every 0", *more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["all", "attention"])
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_resumed_run_keeps_its_teacher(tiny_run, tmp_path, text_file, backend, trainable):
    argv = flags(
        tiny_run, text_file, "--save-every", 2, "--keep", 0, "--log-every", 1, "--backend", backend,
        "--trainable", trainable,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([str(a) for a in (*argv, "--steps", 4, "--out", whole)]) == 0
    assert train.main([str(a) for a in (*argv, "--steps", 4, "--out", parts)]) == 0
    assert train.main(["--resume", "--out", str(parts), "--from-step", "2"]) == 0
    a, b = (checkpoint.latest(run) for run in (whole, parts))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    losses = [
        [
            r["loss"]
            for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            if r["split"] == "train"
        ]
        for run in (whole, parts)
    ]
    assert losses[0] == losses[1]


def test_what_cannot_teach_is_refused(tiny_run, tmp_path, text_file, capsys):
    out = tmp_path / "run"
    base = (*TINY, "--data", text_file, "--out", out)
    assert "--teacher-weight requires --teacher" in refused(capsys, *base, "--teacher-weight 0.5")
    assert "--teacher-temperature requires --teacher" in refused(
        capsys, *base, "--teacher-temperature 2"
    )
    given_teacher = (*base, "--teacher", tiny_run)
    assert "--teacher-weight must be" in refused(capsys, *given_teacher, "--teacher-weight", "1.5")
    assert "--teacher-temperature must be" in refused(
        capsys, *given_teacher, "--teacher-temperature 0"
    )
    assert "no such model folder" in refused(capsys, *base, "--teacher", tmp_path / "nothing")
    longer = refused(capsys, *given_teacher, "--n-positions", "64")
    assert "has 48 positions, a sequence 64 tokens" in longer and "--seq-len 48" in longer
    assert not out.exists()


def test_a_teacher_of_another_tokenizer_is_refused(
    tiny_run, tmp_path, text_file, capsys, shared_data
):
    argv = (*TINY, "--data", text_file, "--out", tmp_path / "run", "--teacher", tiny_run)
    gpt2 = ("--tokenizer", "gpt2", "--bpe-dir", shared_data / "gpt2_bpe")
    assert (
        "--teacher" in (line := refused(capsys, *argv, *gpt2))
        and "its tokenizer has 257 ids" in line
    )
