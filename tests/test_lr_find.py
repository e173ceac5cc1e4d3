"""The learning-rate range test, and the warning before a step exceeds memory."""

import itertools
import re
from types import SimpleNamespace

import pytest
from helpers import TINY, refused

from mlx_mla import train
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.errors import UserError
from mlx_mla.model.config import TrainConfig
from mlx_mla.training import lr_find
from mlx_mla.training.metrics import read_metrics


class Bowl:
    """Gradient descent on w^2 / 2 from w = 2 with a floor of 1: falls where the rate is below 2,
    rises above."""

    def __init__(self, w: float = 2.0):
        self.w = w

    def step(self, step, rate, batches):
        loss = 1 + self.w**2 / 2
        self.w -= 20 * rate * self.w
        return SimpleNamespace(loss=loss)


def test_the_suggestion_lies_below_the_rate_that_diverges():
    points = lr_find.sweep(Bowl(), lambda step: [])
    rates = [p.rate for p in points]
    assert rates[0] == pytest.approx(1e-6)
    assert all(b / a == pytest.approx(rates[1] / rates[0]) for a, b in itertools.pairwise(rates))
    # 20 x rate > 2 diverges; the smoothed loss has risen by half soon after, and the test ends
    # there.
    assert 0.1 < rates[-1] < 1
    assert 1e-3 < lr_find.suggestion(points) < 0.1


def test_a_loss_that_never_falls_is_told():
    class Flat:
        def step(self, step, rate, batches):
            return SimpleNamespace(loss=3.0 + rate)

    with pytest.raises(UserError, match="fell at no learning rate"):
        lr_find.suggestion(lr_find.sweep(Flat(), lambda step: []))


@pytest.mark.slow
def test_the_command_suggests_a_rate_that_learns(tmp_path, text_file, capsys):
    argv = [*TINY, "--data", str(text_file), "--lr-find", "--out", str(tmp_path / "lr")]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    rate = float(re.search(r"suggested: --learning-rate (\S+)", said).group(1))
    assert 1e-5 < rate < 0.5
    assert [p.name for p in (tmp_path / "lr").iterdir()] == ["lr-find.png"]
    assert "needs a new folder" in refused(capsys, *argv)
    out = tmp_path / "run"
    argv = [
        *TINY,
        "--data",
        str(text_file),
        "--out",
        str(out),
        "--steps",
        "30",
        "--learning-rate",
        str(rate),
    ]
    assert train.main([*argv, "--warmup-steps", "3"]) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_a_step_that_exceeds_memory_is_warned_of(tmp_path, text_file, capsys, monkeypatch):
    monkeypatch.setattr(MLXBackend, "memory_bytes", lambda self: 4_000_000)
    argv = [
        *TINY,
        "--data",
        str(text_file),
        "--out",
        str(tmp_path / "run"),
        "--steps",
        "1",
        "--batch-size",
        "8",
    ]
    assert train.main(argv) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: a step takes about" in said
    assert re.search(r"to fit: (--batch-size \d --tokens-per-step 384 )?--checkpoint-every 1", said)


def test_the_last_validation_is_bounded(tmp_path, text_file):
    def last(*flags):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        argv = [
            *TINY,
            "--data",
            str(text_file),
            "--out",
            str(out),
            "--steps",
            "2",
            "--eval-every",
            "2",
        ]
        assert train.main([*argv, *flags]) == 0
        return read_metrics(out / "metrics.jsonl")[-1]["loss"]

    assert last() == last("--final-eval-batches", "1000")
    assert last("--final-eval-batches", "1") != last()
    assert TrainConfig().final_eval_batches == 0
