"""The evaluate command: results, comparisons, resuming, and users' mistakes."""

import json

import numpy as np
import pytest
from helpers import words, write_gpt2_model

from mlx_mla import evaluate
from mlx_mla.checkpoint import write_model
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.evaluation.tasks import TASKS
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import initial_weights


@pytest.fixture(scope="module")
def models(shared_data, tmp_path_factory):
    """Two models of one vocabulary, the second's padded."""
    folder = tmp_path_factory.mktemp("models")
    write_gpt2_model(folder / "a", shared_data, n_embd=16, kv_lora_rank=4)
    write_gpt2_model(
        folder / "b", shared_data, seed=1, n_embd=16, attention="mha", vocab_size=50304
    )
    return [str(folder / "a"), str(folder / "b")]


@pytest.fixture(scope="module")
def data(shared_data, tmp_path_factory):
    """The first rows of the real files."""
    folder = tmp_path_factory.mktemp("data")
    for name, lines in (("lambada", 20), ("hellaswag", 10), ("wikitext2", 12)):
        for path in set(TASKS[name].files.values()):
            text = (shared_data / path).read_text(encoding="utf-8").split("\n")[:lines]
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text("\n".join(text) + "\n", encoding="utf-8")
    return str(folder)


def run(*argv) -> int:
    return evaluate.main(words(*argv))


def results(path):
    return json.loads(path.read_text())


@pytest.mark.torch
def test_both_backends_agree_item_by_item(models, data, tmp_path):
    found = {}
    for backend in ("mlx", "torch"):
        out = tmp_path / backend / "r.json"
        tasks = "wikitext2,lambada,hellaswag"
        where = ("--data-dir", data, "--out", out, "--backend", backend)
        assert run("--model", models[0], "--tasks", tasks, *where) == 0
        items = {}
        for path in sorted((tmp_path / backend / "r.json.items").iterdir()):
            rows = [json.loads(line) for line in path.read_text().splitlines() if line]
            items[path.name.split("-")[0]] = {r["i"]: r["logprob"] for r in rows}
        found[backend] = items
    assert found["mlx"].keys() == found["torch"].keys() == {"wikitext2", "lambada", "hellaswag"}
    for task, items in found["mlx"].items():
        assert items.keys() == found["torch"][task].keys()
        for i, logprobs in items.items():
            assert logprobs == pytest.approx(found["torch"][task][i], abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_the_speed_of_a_model_that_ends_every_text_at_once(tmp_path, backend):
    tokenizer = get_tokenizer("bytes")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "kv_lora_rank": 4}
    config = ModelConfig(**sizes).resolved(tokenizer.size)
    tensors = initial_weights(config, 0)
    # The last norm gives ones, and only the end of text has a row that is not zero.
    tensors["transformer.ln_f.weight"][:], tensors["transformer.ln_f.bias"][:] = 0, 1
    tensors["transformer.wte.weight"][:] = 0
    tensors["transformer.wte.weight"][tokenizer.end_of_text] = 1
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", config, tensors, tokenizer.fast_tokenizer(), "")
    out = tmp_path / "r.json"
    argv = ("--model", tmp_path / "model", "--tasks speed --out", out, "--backend", backend)
    assert run(*argv) == 0
    assert results(out)["models"][0]["tasks"]["speed"]["generation_tps"]["min"] > 0


@pytest.mark.torch
@pytest.mark.parametrize("protocol", ["standard", pytest.param("original", marks=pytest.mark.slow)])
def test_results_file_report_and_table(models, data, tmp_path, capsys, protocol):
    out = tmp_path / "r.json"
    where = ("--data-dir", data, "--out", out, "--backend torch")
    assert run("--model", *models, "--protocol", protocol, *where) == 0
    document = results(out)
    assert [m["model"] for m in document["models"]] == models
    for model in document["models"]:
        assert model["protocol"] == protocol
        assert model["tasks"]["lambada"]["n"] == 20
        assert model["tasks"]["hellaswag"]["n"] == 10
        assert model["tasks"]["hellaswag"]["acc_stderr"] > 0
        assert model["tasks"]["speed"]["generation_tps"]["median"] > 0
    shown = capsys.readouterr().out
    for text in (shown, out.with_suffix(".md").read_text()):
        assert "95 % confidence interval" in text
        assert "no difference shown" in text  # of ten coin tosses
        assert "47 rows that pad the vocabulary are masked" in text
        assert ("validation split instead of the test split" in text) == (protocol == "original")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(models, data, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.json", tmp_path / "r.json"
    argv = ["--model", models[0], "--data-dir", data, "--tasks lambada,hellaswag --batch-size 4"]
    assert run(*argv, "--out", whole) == 0
    from mlx_mla.backends.mlx import score

    passes, plain = [], score.MLXScorer.run

    def stop_after(limit):
        def counted(self, *args):
            passes.append(1)
            if limit is not None and len(passes) > limit:
                raise KeyboardInterrupt
            return plain(self, *args)

        passes.clear()
        monkeypatch.setattr(score.MLXScorer, "run", counted)

    stop_after(None)
    assert run(*argv, "--out", tmp_path / "count.json") == 0
    full = len(passes)
    stop_after(full - 3)
    assert run(*argv, "--out", out) == 130
    assert "lambada" in results(out)["models"][0]["tasks"]  # finished tasks are kept
    with next((tmp_path / "r.json.items").glob("hellaswag*")).open("a") as file:
        file.write('\n{"i": 3, "logp')  # a kill in the middle of a line
    stop_after(None)
    assert run(*argv, "--out", out, "--resume") == 0
    assert len(passes) <= 4
    assert results(out)["models"] == results(whole)["models"]


def test_a_sample_is_of_the_asked_size_and_seeded(models, data, tmp_path):
    scores = []
    for i, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{i}.json"
        argv = ["--model", models[0], "--data-dir", data, "--tasks", "lambada", "--limit", 7]
        assert run(*argv, "--seed", seed, "--out", out) == 0
        tasks = results(out)["models"][0]["tasks"]
        assert tasks["lambada"]["n"] == 7
        scores.append(tasks["lambada"]["ppl"])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.torch
def test_bfloat16_is_used(models, data, tmp_path):
    scores = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        where = ("--data-dir", data, "--out", out, "--backend torch")
        assert run("--model", models[0], "--tasks lambada --dtype", dtype, *where) == 0
        scores.append(np.log(results(out)["models"][0]["tasks"]["lambada"]["ppl"]))
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], rel=0.02)


def test_users_mistakes_are_one_line(models, data, tmp_path, capsys, shared_data, monkeypatch):
    def no(*argv) -> str:
        assert run("--model", models[0], *argv) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error

    assert "--tasks names no task; known: wikitext2, lambada, hellaswag, speed" in no("--tasks ,")
    assert "unknown name 'helaswag'; did you mean 'hellaswag'?" in no("--tasks", "helaswag")
    assert "--limit must be at least 1" in no("--limit", "0")
    assert "no such folder" in no("--data-dir", tmp_path / "missing")
    assert "lambada_test.jsonl: no such file" in no("--data-dir", tmp_path, "--tasks", "lambada")
    assert "give it as --data-dir" in no("--tasks", "lambada")
    assert "--resume needs --out" in no("--resume")
    assert "--model names a model twice" in no("--model", models[0], models[0])
    (tmp_path / "there.json").write_text("{}")
    assert "exists; add --resume" in no("--out", tmp_path / "there.json")
    write_gpt2_model(tmp_path / "short", shared_data, n_embd=16, kv_lora_rank=4, n_positions=64)
    assert run("--model", tmp_path / "short", "--data-dir", data, "--tasks", "wikitext2") == 2
    assert "do not fit this model's n_positions=64; --window 64" in capsys.readouterr().err
    write_gpt2_model(tmp_path / "small", shared_data, n_embd=16, kv_lora_rank=4, vocab_size=300)
    assert run("--model", tmp_path / "small", "--data-dir", data, "--tasks", "lambada") == 2
    assert "tokenizer has 50257 tokens, but the model has 300" in capsys.readouterr().err


def test_another_file_than_the_published_one_is_said(models, data, capsys):
    assert run("--model", models[0], "--data-dir", data, "--tasks", "lambada") == 0
    assert "not the published file" in capsys.readouterr().err
