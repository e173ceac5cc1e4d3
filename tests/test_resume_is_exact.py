"""A run killed at random moments and resumed is the run that never stopped, bit for bit."""

import random
import subprocess
import time

import mlx.core as mx
import pytest
from helpers import TINY, WITHOUT_TORCH, python, unmeasured, words

from mlx_mla import checkpoint
from mlx_mla.training.metrics import read_metrics

STEPS = 30
COMPILED = "compiled"  # no flag: compiling is the default that TINY switches off


def launch(out, text_file, extra, resume: bool) -> subprocess.Popen:
    flags = [*TINY, "--data", str(text_file), "--out", str(out), "--steps", str(STEPS), *extra]
    flags += words("--save-every 4 --eval-every 7 --log-every 3 --keep 0 --sample-every 5")
    if COMPILED in flags:
        flags = [flag for flag in flags if flag not in (COMPILED, "--no-compile")]
    flags += ["--resume"] if resume else []
    return subprocess.Popen(
        python("-m", "mlx_mla.train", *flags), env=WITHOUT_TORCH, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def outcome(out) -> tuple[dict, list]:
    """Every byte of every checkpoint and of the samples, and the metrics without what a clock or a
    meter measured."""
    files = {
        f"{folder.name}/{p.name}": p.read_bytes()
        for folder in checkpoint.checkpoints(out)
        for p in folder.iterdir()
    }
    files["samples"] = (out / "samples.jsonl").read_bytes()
    return files, unmeasured(out)


@pytest.mark.slow
@pytest.mark.skipif(
    mx.is_available(mx.gpu) and not mx.metal.is_available(),
    reason="not promised on CUDA: docs/reliability.md",
)
@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), id="eager"),
        pytest.param((COMPILED,), id="compiled"),
        pytest.param(
            ("--dropout", "0.1", "--dtype", "bfloat16", "--grad-accum-steps", "2"),
            id="bfloat16-dropout",
        ),
    ],
)
def test_killed_and_resumed_is_bit_identical(tmp_path, text_file, extra):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    process = launch(straight, text_file, extra, resume=False)
    assert process.wait(timeout=300) == 0, process.stderr.read()

    chance = random.Random(2026)
    kills = 0
    while True:
        process = launch(broken, text_file, extra, resume=(broken / "config.toml").exists())
        # Wait until this life has made a little progress, then kill after a random moment.
        seen = len(read_metrics(broken / "metrics.jsonl"))
        goal = seen + chance.randint(1, 3)
        while process.poll() is None and len(read_metrics(broken / "metrics.jsonl")) < goal:
            time.sleep(0.002)
        if process.poll() is None:
            time.sleep(chance.random() * 0.05)
            process.kill()
        code = process.wait(timeout=300)
        if code == 0:
            break
        assert code == -9, process.stderr.read()
        kills += 1
        assert kills < 60
        if checkpoint.latest(broken) == checkpoint.checkpoint_path(broken, STEPS):
            break  # killed after the last checkpoint: there is nothing left to resume
    assert kills >= 3

    (files, rows), (expected_files, expected_rows) = outcome(broken), outcome(straight)
    assert rows == expected_rows
    assert files.keys() == expected_files.keys()
    for name, content in expected_files.items():
        assert files[name] == content, name
