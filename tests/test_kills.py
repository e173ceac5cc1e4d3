"""Commands killed at any moment: the next one resumes, and nothing is left of the killed ones."""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY, WITHOUT_TORCH, python

from mlx_mla import checkpoint
from mlx_mla.training.metrics import read_metrics

pytestmark = pytest.mark.slow
KILLS = 8


def run_killed(argv: list[str], begun: Callable[[], bool]) -> None:
    """Run a command, killing its first processes a random moment after each has begun to write; the
    last one must succeed."""
    chance = random.Random(2026)
    for left in range(KILLS, -1, -1):
        process = subprocess.Popen(
            python(*argv), env=WITHOUT_TORCH, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        if left:
            while process.poll() is None and not begun():
                time.sleep(0.001)
            time.sleep(chance.random() * chance.choice((0.005, 0.1)))
            process.kill()
        _, said = process.communicate(timeout=300)
        assert process.returncode in ((0, -9) if left else (0,)), said


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*")]


def test_training(tmp_path, text_file):
    out = tmp_path / "run"
    argv = ["-m", "mlx_mla.train", *TINY, "--data", str(text_file), "--out", str(out)]
    argv += ["--steps", "12", "--save-every", "1", "--keep", "2", "--auto-resume"]
    saved = {checkpoint.latest(out)}

    def begun() -> bool:
        newest = checkpoint.latest(out)
        return newest not in saved and not saved.add(newest)

    run_killed(argv, begun)
    assert [p.name for p in checkpoint.checkpoints(out)] == ["step-000011", "step-000012"]
    assert all(checkpoint.integrity_error(p) is None for p in checkpoint.checkpoints(out))
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if row["split"] == "train"]
    assert steps == [1, 10, 12]
    assert hidden(out) == []


def test_conversion(tiny_run, tmp_path):
    out = tmp_path / "model"
    argv = ["-m", "convert", str(tiny_run), "--out", str(out)]
    run_killed(argv, lambda: bool(hidden(tmp_path)))
    assert checkpoint.integrity_error(out) is None
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_preparation(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.txt").write_text(f"Text {i} of some words. " * 4000)
    argv = ["-m", "mlx_mla.prepare", str(tmp_path / "in"), "--tokenizer", "bytes"]
    argv += ["--val-fraction", "0.3", "--shard-tokens", "200000", "--out"]
    assert subprocess.run(python(*argv, str(tmp_path / "straight")), check=False).returncode == 0
    out = tmp_path / "out"
    run_killed([*argv, str(out)], out.is_dir)
    assert hidden(out) == []
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "straight").iterdir()
    }
