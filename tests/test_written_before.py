"""Files that version 0.2.0 wrote are read as before: settings, a run, model folders, a study."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import objects, train_command

from bench import study
from mlx_mla import train
from mlx_mla.backends import get_backend
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.evaluation.scoring import RowBatch
from mlx_mla.training.metrics import read_metrics

ARCHIVE = Path(__file__).with_name("written_by_0_2.tar.gz")


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """The unpacked archive, as the working directory, which its relative paths start from."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path / "written_by_0_2")
    return Path.cwd()


@pytest.fixture
def expected(old) -> dict:
    """What 0.2.0 itself made of these files."""
    return json.loads((old / "expected.json").read_text())


def test_settings(old):
    config = train_command(["--config", "config.toml"]).resolved()
    assert config.activation_checkpointing == 1  # its former name is in the file
    assert (config.steps, config.keep, config.learning_rate) == (4, 0, 0.01)
    assert (config.model.n_embd, config.model.kv_lora_rank) == (8, 4)


def test_a_run_resumes_to_the_same_losses(old, expected):
    assert train.main(["--resume", "--out", "run", "--data", "text.txt"]) == 0
    rows = read_metrics(old / "run" / "metrics.jsonl")
    assert [[r["step"], r["split"]] for r in rows] == [row[:2] for row in expected["losses"]]
    # Bit-identical on the machine that wrote them; another one rounds sums differently.
    losses = [row[2] for row in expected["losses"]]
    np.testing.assert_allclose([r["loss"] for r in rows], losses, rtol=1e-5)


@pytest.mark.parametrize("name", ["converted", "quantised"])
def test_models_give_the_same_text_and_probabilities(old, expected, name, capfd):
    argv = ("--model", name, "--prompt", "The cache", "--temp", "0", "--max-tokens", "16")
    assert objects(capfd, *argv, "--device", "cpu")[0]["text"] == expected[name]["text"]
    scorer = get_backend("mlx", "cpu").scorer(ModelFolder(old / name))
    ids = np.frombuffer(b"The cache holds one latent", np.uint8).astype(np.int32)[None]
    at = np.arange(ids.shape[1] - 1, dtype=np.int32)
    found, _ = scorer.run(None, [RowBatch(ids[:, :-1], np.zeros(1, np.int32), at, ids[0, 1:])])
    assert -float(found.sum()) == pytest.approx(expected[name]["nats"], abs=1e-3)


def test_a_study_prints_its_report(old, capsys):
    report = old / "study" / "report.md"
    report.unlink()
    assert study.main(["study.toml", "--out", "study", "--quick", "--report-only"]) == 0
    assert "mla, tiny, 1,280 tokens: not shown" in capsys.readouterr().out
    lines = report.read_text().splitlines()
    for arm in ("mha", "mla"):
        assert any(line.startswith(f"| {arm} |") and "4.9099" in line for line in lines), lines
