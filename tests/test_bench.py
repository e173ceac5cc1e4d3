"""The benchmarks run, keep what they have, and refuse what they cannot do. Speeds are never
asserted."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch")

NARROW = [
    *("--quick", "--models", "gpt2-124m", "mla-124m", "--batch", "1", "--context", "64"),
    *("--repetitions", "1", "--forward-batch", "1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def compare():
    from bench import compare_backends

    return compare_backends


@pytest.fixture(scope="module")
def report(compare, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "report"
    assert compare.main([*NARROW, "--out", str(out)]) == 0
    return out


def rows(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


@pytest.mark.slow
def test_every_measure_has_rows_for_both_backends_and_the_outside_references(report):
    found = {(r["measure"], r["backend"], r["model"]) for r in rows(report)}
    for measure in ("forward", "first token", "decoding"):
        for backend, outside in (("mlx", "mlx-lm gpt2"), ("torch", "transformers GPT-2")):
            for model in ("gpt2-124m", "mla-124m", outside):
                assert (measure, backend, model) in found
    assert ("decoding", "torch", "original's decoding (mla-124m)") in found
    assert {(b, m) for x, b, m in found if x == "training"} == {
        (b, m) for b in ("mlx", "torch") for m in ("gpt2-124m", "mla-124m")
    }
    for r in rows(report):
        assert r["status"] == "ok"
        t = r["tokens_per_sec"]
        assert 0 < t["min"] <= t["median"] <= t["max"]
        assert len(t["values"]) == 1
        assert r["roofline"] > 0
    latent, whole = (
        next(
            r
            for r in rows(report)
            if (r["measure"], r["backend"], r["model"]) == ("decoding", "torch", m)
        )
        for m in ("mla-124m", "gpt2-124m")
    )
    assert whole["cache_bytes_per_token"] == 4 * latent["cache_bytes_per_token"]
    assert whole["cache_bytes"] == 4 * latent["cache_bytes"]


@pytest.mark.slow
def test_the_report_shows_the_tables_and_plots(report):
    text = (report / "report.md").read_text()
    for part in (
        "## Forward",
        "## First token",
        "## Decoding",
        "## Training",
        "| 1.00x |",
        "GFLOP/s",
    ):
        assert part in text
    for name in ("forward", "decoding", "training", "cache"):
        assert f"]({name}.png)" in text
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_resuming_keeps_rows_and_measures_the_missing(compare, report, capfd):
    before = rows(report)
    document = json.loads((report / "results.json").read_text())
    (report / "results.json").write_text(json.dumps({**document, "rows": before[:-3]}))
    assert compare.main([*NARROW, "--out", str(report), "--resume"]) == 0
    after = rows(report)
    for row in before + after:
        del row["roofline"]  # taken anew from the rates of the last run
    assert after[:-3] == before[:-3]
    keys = ("measure", "backend", "model", "cache", "batch", "context")
    assert [[r[k] for k in keys] for r in after[-3:]] == [[r[k] for k in keys] for r in before[-3:]]


@pytest.mark.slow
def test_a_subject_that_computes_something_else_is_not_timed(compare, tmp_path, monkeypatch, capfd):
    from bench import subjects

    real = subjects.load

    def wrong(backend, model, config, weights, *rest):
        if backend == "torch":
            weights = {k: w * (1.1 if "ln_f" in k else 1) for k, w in weights.items()}
        return real(backend, model, config, weights, *rest)

    monkeypatch.setattr(subjects, "load", wrong)
    out = tmp_path / "out"
    assert (
        compare.main([*NARROW, "--measures", "forward", "--models", "mla-124m", "--out", str(out)])
        == 0
    )
    (verdict, *others) = rows(out)
    assert (verdict["measure"], verdict["backend"]) == ("parity", "torch")
    assert "not timed" in verdict["status"]
    assert {r["backend"] for r in others} == {"mlx"}


@pytest.mark.slow
def test_running_out_of_memory_marks_the_row_and_goes_on(compare, tmp_path, monkeypatch, capfd):
    from bench.subjects import torch as subject_torch

    def full(self, ids):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(subject_torch.TorchSubject, "forward", full)
    out = tmp_path / "out"
    assert (
        compare.main([*NARROW, "--measures", "forward", "--models", "mla-124m", "--out", str(out)])
        == 0
    )
    status = {r["backend"]: r["status"] for r in rows(out)}
    assert status == {"mlx": "ok", "torch": "out of memory"}
    assert "out of memory" in (out / "report.md").read_text()


def test_bad_input_gets_one_line(compare, tmp_path, capsys, tiny_run):
    from helpers import refused

    def no(*argv):
        return refused(capsys, *argv, command=compare.main)

    assert "did you mean 'mla-124m'" in no("--models", "mla-124")
    assert "invalid choice 'jax'" in no("--backends", "jax")
    assert "at least 1" in no("--repetitions", "0")
    assert "--resume needs --out" in no("--resume")
    (tmp_path / "results.json").write_text("{}")
    assert "holds results; add --resume" in no("--out", tmp_path)
    assert "not results of this benchmark" in no("--out", tmp_path, "--resume")
    folder = shutil.copytree(tiny_run / "checkpoints/step-000040", tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization": {"bits": 4, "group_size": 32}})
    )
    assert "which only MLX reads; compare the folder it was made from" in no("--models", folder)


STORED = Path(__file__).parent.parent / "bench" / "results"


@pytest.mark.parametrize(
    "path",
    # A study keeps its runs; what holds for those is in test_study.py.
    sorted(p for p in STORED.glob("**/*.json") if '"runs":' not in p.read_text()),
    ids=lambda path: str(path.relative_to(STORED)),
)
def test_stored_reports_say_what_their_results_say(path, tmp_path):
    from bench import harness

    stored = harness.read(path)
    copy = tmp_path / path.name
    harness.write(harness.report_of(stored, path), stored, copy)
    assert json.loads(copy.read_text()) == stored
    for written in tmp_path.iterdir():
        assert path.with_name(written.name).is_file()
        if written.suffix == ".md":
            assert written.read_text() == path.with_name(written.name).read_text()


def test_the_harness_refuses_what_is_no_report(tmp_path, capsys):
    from bench import harness

    for text, said in (("{", "not results"), ("[]", "not results"), (None, "cannot be read")):
        path = tmp_path / "some.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        assert harness.main([str(path)]) == 2
        assert said in capsys.readouterr().err
    path.write_text('{"machine": {}, "report": "os.path"}')
    assert harness.main([str(path)]) == 2
    assert "does not name its benchmark" in capsys.readouterr().err


@pytest.mark.slow
def test_core_bench_runs(capfd, tmp_path):
    from bench import core

    assert core.main(["--quick", "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    for part in ("nano, compiled", "nano, latent", "checkpoint save"):
        assert part in said
    assert len(list(tmp_path.glob("*_core.json"))) == 1


@pytest.mark.slow
def test_evaluation_bench_does_equal_work(shared_data, tmp_path, capfd):
    pytest.importorskip("lm_eval", reason="needs lm_eval, in the extra named referees")
    from helpers import write_gpt2_model

    from bench import evaluation

    folder = write_gpt2_model(tmp_path / "model", shared_data, n_embd=16, kv_lora_rank=4)
    argv = [
        "--data-dir",
        str(shared_data),
        "--model",
        str(folder),
        "--limit",
        "12",
        "--out",
        str(tmp_path / "out"),
    ]
    assert evaluation.main([*argv, "--batch-size", "4"]) == 0
    (path,) = (tmp_path / "out").glob("*_evaluation.json")
    found = json.loads(path.read_text())["rows"]
    assert len(found) == 6
    for task in ("hellaswag", "lambada"):
        rows = [r for r in found if r["task"] == task]
        assert {r["subject"] for r in rows} == {"lm_eval hf", "mlx_mla mlx", "mlx_mla torch"}
        assert {r["items"] for r in rows} == {12}
        assert len({r["acc"] for r in rows}) == 1
    assert "| against lm_eval |" in path.with_suffix(".md").read_text()


def test_evaluation_bench_refuses(shared_data, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="needs lm_eval, in the extra named referees")
    from helpers import refused

    from bench import evaluation

    def no(*argv):
        return refused(capsys, "--data-dir", shared_data, *argv, command=evaluation.main)

    assert "wikitext2 has too few items" in no("--tasks", "wikitext2")
    assert "must be at least 1" in no("--limit", "0")
    assert "did you mean lambada?" in no("--tasks", "lamda")


@pytest.mark.slow
def test_convert_bench_measures_every_cell_and_resumes(text_file, tmp_path, capfd):
    from bench import convert_mla
    from mlx_mla import train

    run = tmp_path / "run"
    argv = [
        "--attention",
        "mha",
        "--n-layer",
        "2",
        "--n-head",
        "2",
        "--n-embd",
        "16",
        "--n-positions",
        "32",
    ]
    argv += [
        "--data",
        str(text_file),
        "--out",
        str(run),
        "--steps",
        "40",
        "--batch-size",
        "4",
        "--eval-every",
        "0",
    ]
    assert train.main([*argv, "--backend", "torch", "--device", "cpu", "--sample-tokens", "0"]) == 0
    flags = ["--model", str(run), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    flags += [
        "--fractions",
        "1",
        "0.25",
        "--heal",
        "0.2",
        "--heal-fractions",
        "0.25",
        "--calibration-tokens",
        "2000",
    ]
    assert convert_mla.main(flags) == 0
    (path,) = (tmp_path / "out").glob("*_convert.json")
    cells = json.loads(path.read_text())["cells"]
    named = {(c["rank"], c["method"], c["budget"], c["heal"], c["teacher"]): c for c in cells}
    assert len(named) == len(cells) == 3 + 6 + 2 + 1
    for method in ("svd", "whitened", "balanced"):
        assert abs(named[16, method, False, 0.0, False]["change"]) < 0.01  # full rank is exact
        assert named[4, method, False, 0.0, False]["stderr"] > 0
    assert (
        named[4, "balanced", True, 0.2, False]["change"]
        < named[4, "balanced", True, 0.0, False]["change"]
    )
    assert named[16, "the MHA model", False, 0.2, False]["change"] < 0
    (tmp_path / "work" / "r16-svd.json").unlink()
    capfd.readouterr()
    assert convert_mla.main(flags) == 0
    assert json.loads(path.read_text())["cells"] == cells
    assert (
        convert_mla.main(["--model", str(tmp_path / "nowhere"), "--work", str(tmp_path / "w")]) == 2
    )


@pytest.mark.slow
def test_prepare_is_timed_against_tiktoken_and_weighed(shared_data, tmp_path, capsys):
    from bench import prepare as bench

    src = shared_data / "corpus/debian_sqlite_doc"
    argv = [
        str(src),
        "--bpe-dir",
        str(shared_data / "gpt2_bpe"),
        "--megabytes",
        "0.2",
        "--repetitions",
        "1",
    ]
    assert (
        bench.main(
            [*argv, "--web-page", "900", "--memory-shard-tokens", "20000", "--out", str(tmp_path)]
        )
        == 0
    )
    said = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert {r["subject"] for r in found["speed"]} == {
        bench.ALONE,
        bench.PLAIN,
        bench.XZ,
        bench.UNPACK,
    }
    assert all(
        r["bytes"] >= 200_000 and min(r["seconds"] + r["cpu_seconds"]) > 0 for r in found["speed"]
    )
    assert found["memory"][1]["bytes"] > 3 * found["memory"][0]["bytes"]
    assert all(m["peak_bytes"] > 10**7 for m in found["memory"])
    assert said.count("1.00x") >= 2


@pytest.mark.slow
def test_training_measures_memory_speed_and_plans(tmp_path, capsys):
    from bench import training

    assert training.main(["--quick", "--repetitions", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads(next(tmp_path.glob("*_training.json")).read_text())["rows"]
    held = [r for r in rows if r["what"] == "memory"]
    assert [r["checkpoint_every"] for r in held] == [0, 1]
    for r in held:
        parts = ("state_bytes", "gradient_bytes", "activation_bytes")
        assert sum(r["measured"][part] for part in parts) == r["measured"]["total_bytes"]
    assert {r["case"] for r in rows if r["what"] == "speed"} == {
        "plain PyTorch loop",
        "torch",
        "mlx",
    }
    assert "| nano | bfloat16 |" in capsys.readouterr().out


def test_a_plan_puts_in_what_fits():
    from bench import training
    from mlx_mla.estimate import estimate

    config = training.settings("mla-124m", dtype="float32", seq_len=1024)
    batch = training.largest_batch(config, 32e9)
    totals = [
        estimate(training.settings("mla-124m", dtype="float32", batch_size=b), True)
        for b in (batch, 2 * batch)
    ]
    assert totals[0].total_bytes <= 32e9 < totals[1].total_bytes


@pytest.mark.slow
def test_decode_bench_measures_every_cell_and_resumes(tmp_path, monkeypatch, capfd):
    import mlx.core as mx

    from bench import decode, subjects

    monkeypatch.setattr(subjects, "rates", lambda *_: (1e11, 1e10))  # seconds, four times
    monkeypatch.setattr(mx, "compile", lambda f, **_: f)  # half a minute in the C++ compiler
    argv = [
        "--quick",
        "--backends",
        "mlx",
        "--models",
        "gpt2-124m",
        "mla-124m",
        "--out",
        str(tmp_path),
    ]
    assert decode.main(argv) == 0
    (path,) = tmp_path.glob("*_decode.json")
    found = json.loads(path.read_text())["rows"]
    cells = {
        (r["batch"], r["context"], r["model"], r["cache"])
        for r in found
        if r["measure"] == "decoding"
    }
    kinds = (("gpt2-124m", "materialized"), ("mla-124m", "latent"), ("mla-124m", "materialized"))
    assert cells == {(b, c, *kind) for b in (1, 3) for c in (16, 48) for kind in kinds}
    paths = {(r["context"], r["new"], r["path"]) for r in found if r["measure"] == "chunk"}
    assert paths == {
        (c, n, p) for c in (16, 48) for n in (2, 8, 32) for p in ("absorbed", "expanded", "chosen")
    }
    assert {r["cache"] for r in found if r["measure"] == "overhead"} == {"eager", "compiled"}
    report = path.with_suffix(".md").read_text()
    assert "within 5 % of the better cache" in report
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert decode.main([*argv, "--resume"]) == 0
    assert json.loads(path.read_text())["rows"] == found
    assert decode.main(argv) == 2
    assert "add --resume" in capfd.readouterr().err


@pytest.mark.slow
def test_serve_bench_finds_no_errors(tmp_path, capfd):
    from bench import serve

    argv = [
        "--presets",
        "mla-124m-r128",
        "--layers",
        "1",
        "--clients",
        "3",
        "--seconds",
        "1.5",
        "--max-tokens",
        "4",
    ]
    assert serve.main([*argv, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*_serve.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["requests"] == row["same"] >= 3
    assert row["failed"] == row["different"] == 0


@pytest.mark.slow
def test_trained_bench_measures_quantisation_and_drafts(tiny_run, text_file, tmp_path, capfd):
    from bench import decode_trained

    argv = [
        "--models",
        str(tiny_run),
        "--text",
        str(text_file),
        "--windows",
        "4",
        "--draft",
        str(tiny_run),
    ]
    assert decode_trained.main([*argv, "--tokens", "8", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*_decode-trained.json")
    document = json.loads(path.read_text())
    assert document["quality"][0]["change"] == 0
    assert all(r["same_text"] for r in document["speed"])
