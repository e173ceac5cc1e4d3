"""Tasks run during training: `python -m mlx_mla.train --eval-tasks`."""

import json

import pytest
from helpers import TINY, refused, words

from mlx_mla import evaluate, train
from mlx_mla.evaluation.tasks import TASKS
from mlx_mla.training.metrics import read_metrics


@pytest.fixture(scope="module")
def data(shared_data, tmp_path_factory):
    """The first lines of real files."""
    folder = tmp_path_factory.mktemp("data")
    for path, lines in (("lambada/lambada_test.jsonl", 30), ("hellaswag/hellaswag_val.jsonl", 8)):
        text = (shared_data / path).read_text(encoding="utf-8").split("\n")[:lines]
        (folder / path).parent.mkdir()
        (folder / path).write_text("\n".join(text) + "\n", encoding="utf-8")
    path = TASKS["wikitext2"].files["standard"]
    (folder / path).parent.mkdir()
    (folder / path).write_text(
        (shared_data / path).read_text(encoding="utf-8")[:4000], encoding="utf-8"
    )
    return folder


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_metrics_are_those_of_evaluate_and_training_is_the_same(backend, text_file, data, tmp_path):
    argv = words(*TINY, "--data", text_file, "--steps 4 --eval-every 2 --log-every 1")
    argv += ["--backend", backend]
    wanted = words("--eval-tasks lambada,wikitext2 --eval-limit 6 --eval-data-dir", data)
    assert train.main([*argv, "--out", str(tmp_path / "plain")]) == 0
    assert train.main([*argv, "--out", str(tmp_path / "run"), *wanted]) == 0
    plain, rows = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "run"))
    found = [row for row in rows if row["split"] in TASKS]
    assert [(r["step"], r["split"]) for r in found] == [
        (s, t) for s in (2, 4) for t in ("lambada", "wikitext2")
    ]
    assert [r["loss"] for r in rows if r["split"] not in TASKS] == [r["loss"] for r in plain]
    argv = words("--model", tmp_path / "run", "--data-dir", data, "--tasks lambada,wikitext2")
    out = tmp_path / "r.json"
    argv += words("--limit 6 --seed 1337 --window 48 --backend", backend, "--out", out)
    assert evaluate.main(argv) == 0
    tasks = json.loads(out.read_text())["models"][0]["tasks"]
    for row in found[2:]:
        assert row.keys() - {"step", "split", "seconds"} == tasks[row["split"]].keys()
        assert row["n"] == tasks[row["split"]]["n"]
    assert found[2]["ppl"] == pytest.approx(tasks["lambada"]["ppl"], rel=1e-5)
    assert found[3]["token_ppl"] == pytest.approx(tasks["wikitext2"]["token_ppl"], rel=1e-5)


def test_mistakes_are_told_before_the_run_folder_is_made(text_file, data, tmp_path, capsys):
    def no(*argv: str) -> str:
        run = ("--data", text_file, "--steps 2 --out", tmp_path / "run")
        error = refused(capsys, *TINY, *run, *argv)
        assert not (tmp_path / "run").exists()
        return error

    there = ["--eval-data-dir", str(data)]
    assert "--eval-tasks: unknown name 'lamb'; did you mean 'lambada'?" in no(
        "--eval-tasks lamb", *there
    )
    assert "--eval-tasks names no task" in no("--eval-tasks", ",", *there)
    assert "no such file" in no("--eval-tasks", "lambada", "--eval-data-dir", str(tmp_path))
    assert "--eval-data-dir in training" in no("--eval-tasks", "lambada")
    assert "does not fit this model's n_positions=48" in no("--eval-tasks", "hellaswag", *there)
    assert "--eval-data-dir requires --eval-tasks" in no(*there)
    assert "--eval-limit must be at least 1" in no("--eval-tasks lambada --eval-limit 0", *there)
