"""A refusal is one line on stderr; advice comes once, and on success only."""

import pytest
from helpers import TINY, tiny_train, words

from mlx_mla import evaluate, generate, train
from mlx_mla.backends import blas

ADVICE = "this machine could be faster"


@pytest.fixture(autouse=True)
def advice(monkeypatch):
    monkeypatch.setattr(blas, "hint", lambda: ADVICE)


def refusals(run, tmp_path):
    """Commands that have advice to give before they find out what is wrong."""
    empty = tmp_path / "empty.txt"
    empty.touch()
    (tmp_path / "broken").mkdir()
    yield train.main, [*TINY, "--data", str(empty), "--out", str(tmp_path / "run")]
    yield train.main, [*TINY, "--data", str(tmp_path / "none.txt")]
    yield generate.main, ["--model", str(run), "--prompt", "x", "--max-tokens", "999"]
    yield (
        generate.main,
        words("--model", run, "--prompt x --prompt-cache", tmp_path / "none.safetensors"),
    )
    yield (
        evaluate.main,
        ["--model", str(run), "--tasks", "lambada", "--data-dir", str(tmp_path / "broken")],
    )


def test_a_refusal_prints_one_line(tiny_run, tmp_path, capfd):
    for main, argv in refusals(tiny_run, tmp_path):
        assert main(argv) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err


def test_advice_is_given_once_after_success(tiny_run, tmp_path, text_file, capfd):
    tiny_train(tmp_path / "run", "--steps", "2", "--data", text_file)
    assert capfd.readouterr().err == f"{ADVICE}\n"
    assert generate.main(["--model", str(tiny_run), "--prompt", "x", "--max-tokens", "2"]) == 0
    assert capfd.readouterr().err.splitlines()[1:] == [ADVICE]


def test_advice_of_a_refused_command_is_not_given_by_the_next(
    tiny_run, tmp_path, capfd, monkeypatch
):
    main, argv = next(refusals(tiny_run, tmp_path))
    assert main(argv) == 2
    monkeypatch.setattr(blas, "hint", lambda: None)
    assert generate.main(["--model", str(tiny_run), "--prompt", "x", "--max-tokens", "2"]) == 0
    assert ADVICE not in capfd.readouterr().err
