"""The benchmarks run, keep what they have, and refuse what they cannot do. Speeds are never
asserted."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_mla.errors import UserError

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
        assert min(r["rates"].values()) > 0
        decoded_in_mlx = r["measure"] == "decoding" and r["backend"] == "mlx"
        assert (r["waited_ms"] is not None) == decoded_in_mlx
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
def test_parity_is_in_the_results_and_first_in_the_report(report):
    found = json.loads((report / "results.json").read_text())["parity"]
    compared = {(f["weights"], f["backend"], f["model"]) for f in found}
    assert compared == {
        ("gpt2-124m", "torch", "gpt2-124m"),
        ("gpt2-124m", "mlx", "mlx-lm gpt2"),
        ("gpt2-124m", "torch", "transformers GPT-2"),
        ("mla-124m", "torch", "mla-124m"),
    }
    text = (report / "report.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Parity"
    for f in found:
        # Different kernels round differently, so a difference of exactly nothing was not measured.
        assert 0 < f["largest_logit_difference"] <= f["allowed"] == 1e-3
        assert f["ok"]
        assert f["against"] == f"mlx {f['weights']}"
        shown = f"| {f['backend']} {f['model']} | {f['against']} | {f['positions']} "
        assert f"{shown}| {f['largest_logit_difference']:.2g} |" in text


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
    for name in (
        "forward",
        "first",
        "decoding-mlx",
        "decoding-torch",
        "training",
        "cache",
    ):
        assert f"]({name}.png)" in text
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_resuming_keeps_rows_and_measures_the_missing(compare, report, capfd):
    before = rows(report)
    document = json.loads((report / "results.json").read_text())
    (report / "results.json").write_text(json.dumps({**document, "rows": before[:-3]}))
    assert compare.main([*NARROW, "--out", str(report), "--resume"]) == 0
    after = rows(report)
    assert after[:-3] == before[:-3]
    keys = ("measure", "backend", "model", "cache", "batch", "context")
    assert [[r[k] for k in keys] for r in after[-3:]] == [[r[k] for k in keys] for r in before[-3:]]


MLA_TO_WEIGH = {"n_layer": 12, "n_head": 4, "n_embd": 64, "n_positions": 4200, "vocab_size": 300}
BATCH, CONTEXT = 4, 4000


def _weighed(attention: str):
    """A model whose cache is most of what decoding holds."""
    from mlx_mla.model.config import ModelConfig
    from mlx_mla.model.weights import initial_weights

    rank = {} if attention == "mha" else {"kv_lora_rank": 32}
    config = ModelConfig(attention=attention, **MLA_TO_WEIGH, **rank).resolved()
    return config, initial_weights(config, 0)


@pytest.mark.parametrize(
    ("attention", "kind", "width"),
    [("mha", "materialized", 2 * 64), ("mla", "materialized", 2 * 64), ("mla", "latent", 32)],
)
@pytest.mark.parametrize("others", [0, 300_000_000])
def test_peak_memory_is_the_subjects_own(attention, kind, width, others):
    """The weights, the cache once, and a little to compute with, whatever else is in memory."""
    import mlx.core as mx

    from bench import subjects

    config, weights = _weighed(attention)
    resident = mx.ones((others // 4,))
    mx.eval(resident)
    subject = subjects.load("mlx", "weighed", config, weights, "float32", "cpu")
    held = 12 * BATCH * 4096 * width * 4  # layers x rows x room for 4,096 tokens x values x bytes
    held += sum(w.nbytes for w in weights.values())
    assert subject.decode(BATCH, CONTEXT, 2, kind).cache_bytes > 0.9 * held - 10_000_000
    peak = subject.memory.peak()
    # Attention of one layer of twelve may copy its keys and values, scores are small.
    assert held <= peak < 1.35 * held
    del subject, resident
    subjects.release("mlx")


def test_one_subject_is_in_memory_at_a_time():
    from bench.timing import Case, there_and_back, time_cases

    alive: list[str] = []
    order: list[str] = []

    class Loaded:
        def __init__(self, name):
            assert not alive, f"{name} beside {alive}"
            self.name = name
            self.memory = self
            alive.append(name)

        def __del__(self):
            alive.remove(self.name)

        def reset(self):
            self.held = 0

        def peak(self):
            return self.held

    def run(subject):
        order.append(subject.name)
        subject.held = len(subject.name)

    def case(name):
        key = {"measure": "forward", "backend": "torch", "model": name, "cache": None}
        key |= {"batch": 1, "context": 1}
        return Case(key, lambda: Loaded(name), run, 1, 1.0, 1.0, {})

    found = time_cases([case("a"), case("bb"), case("ccc")], 4)
    assert [r["peak_bytes"] for r in found] == [1, 2, 3]
    assert [len(r["tokens_per_sec"]["values"]) for r in found] == [4, 4, 4]
    assert not alive
    visits = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert visits == ["a", "bb", "ccc", "bb", "a"]
    assert list(there_and_back("ab", 5)) == [("a", 3), ("b", 5), ("a", 2)]
    assert list(there_and_back("ab", 1)) == [("a", 1), ("b", 1)]


def test_a_trainer_gives_its_memory_back():
    import mlx.core as mx
    import numpy as np

    from bench import subjects
    from bench.training import settings

    config = settings("nano", dtype="float32", batch_size=1, seq_len=64, compile=False)
    ids = np.ones((1, 64), np.int32)
    subjects.release("mlx")
    before = mx.get_active_memory()
    for _ in range(2):
        trainer = subjects.load_trainer("mlx", config, "cpu")
        trainer.step(ids, ids)
        # AdamW: weights, gradients and two moments, all in float32.
        weights = sum(4 * n for n in _sizes(config.model))
        assert 3 * weights < trainer.memory.peak() < 20 * weights
        del trainer
        subjects.release("mlx")
        assert mx.get_active_memory() - before < 0.1 * weights


def _sizes(model):
    from math import prod

    from mlx_mla.model.weights import parameter_shapes

    return [prod(shape) for shape in parameter_shapes(model).values()]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["latent", "materialized"])
def test_mlx_decodes_with_what_generate_decodes_with(batch, kind):
    """The same tokens as mlx-lm's own loops give after the same cache, pipelined or waited for."""
    import mlx.core as mx
    import numpy as np

    from bench import subjects

    config, weights = _weighed("mla")
    subject = subjects.load("mlx", "weighed", config, weights, "float32", "cpu")
    subject._use(kind)
    cache = subject._filled(batch, 700, 8)
    assert {type(c).__name__ for c in cache} == {"KVCache" if batch == 1 else "BatchKVCache"}
    assert all(c.keys.shape[2] == 768 for c in cache)  # multiples of 256, as mlx-lm's grow
    tokens = np.array(list(subject._tokens(batch, cache, 5))).reshape(5, batch)
    cache, y = subject._filled(batch, 700, 8), mx.zeros((batch, 1), mx.int32)
    for row in tokens:
        y = mx.argmax(subject._network(y, cache=cache)[:, -1], axis=-1, keepdims=True)
        assert y[:, 0].tolist() == row.tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_torch_decodes_on_mps_with_the_cache_that_generate_has_there(batch):
    """Of fixed shape; the numbers are those of the cache that grows."""
    import torch
    from transformers import StaticCache

    from bench import subjects
    from mlx_mla.backends.torch.decode import GrowingCache

    config, weights = _weighed("mla")
    subject = subjects.load("torch", "weighed", config, weights, "float32", "cpu")
    subject._use("latent")
    logits = {}
    for fixed, cache_type in ((False, GrowingCache), (True, StaticCache)):
        subject.fixed_shapes = fixed
        with torch.inference_mode():
            cache = subject._filled(batch, 50)
            assert isinstance(cache, cache_type)
            y = torch.zeros((batch, 1), dtype=torch.long)
            mask = subject._mask(batch, 51)
            out = subject._network(y, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits[fixed] = out.logits
        timed = subject.decode(batch, 50, 2, "latent")
        length = config.n_positions if fixed else 52
        assert timed.cache_bytes == 12 * batch * length * 32 * 4
    assert (logits[True] - logits[False]).abs().max() < 1e-5


def test_the_first_token_needs_the_head_once():
    """Counted by hand: a block's matrices for every token, the head's for the last."""
    from bench.subjects import costs
    from mlx_mla.model.config import ModelConfig

    c = ModelConfig(attention="mha", n_layer=2, n_head=2, n_embd=8, n_positions=32, vocab_size=100)
    c = c.resolved()
    matrices = 2 * (8 * 24 + 8 * 8 + 2 * 8 * 32)
    scores = 2 * 2 * 2 * 8 * 5.5  # layers x (scores and values) x a multiply-add x width x keys
    assert costs.prompt_flops(c, 10) == 10 * (2 * matrices + scores) + 2 * 8 * 100


def test_a_benchmark_stops_after_its_minutes_and_goes_on(compare, tmp_path, monkeypatch, capfd):
    from bench import subjects

    monkeypatch.setattr(subjects, "rates", lambda *_: (1e11, 1e10))
    argv = [*NARROW, "--models", "mla-124m", "--backends", "mlx", "--measures", "forward"]
    argv += ["--out", str(tmp_path / "out"), "--resume"]
    assert compare.main([*argv, "--minutes", "1e-9"]) == compare.UNFINISHED
    assert rows(tmp_path / "out") == []
    assert "--resume goes on" in capfd.readouterr().err
    assert compare.main([*argv, "--minutes", "60"]) == 0
    assert len(rows(tmp_path / "out")) == 2


def test_a_roofline_is_taken_of_the_rates_beside_its_row():
    from bench.compare_report import set_rooflines

    need = {"status": "ok", "flops": 1e9, "bytes": 1e6, "ms": 10.0, "backend": "mlx"}
    fast, slow = (
        {**need, "rates": {"matmul_flops": f, "memory_bytes": 1e9}} for f in (4e11, 1.25e11)
    )
    set_rooflines({"rows": [fast, slow]})
    assert (fast["roofline"], slow["roofline"]) == pytest.approx((0.25, 0.8))


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
    (verdict,) = json.loads((out / "results.json").read_text())["parity"]
    assert (verdict["backend"], verdict["ok"]) == ("torch", False)
    assert verdict["largest_logit_difference"] > verdict["allowed"]
    assert "| not timed |" in (out / "report.md").read_text()
    assert {r["backend"] for r in rows(out)} == {"mlx"}


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
    assert "--minutes needs --out" in no("--minutes", "5")
    assert "holds results; add --resume" in no("--out", tmp_path)
    assert "not results of this benchmark" in no("--out", tmp_path, "--resume")
    another = {"machine": {}, "settings": {"dtype": "bfloat16"}, "parity": [], "rows": []}
    (tmp_path / "results.json").write_text(json.dumps(another))
    assert "measured with dtype bfloat16, not float32" in no("--out", tmp_path, "--resume")
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


def test_a_document_says_what_the_frameworks_found_on_the_devices_that_were_measured():
    from bench import harness

    facts = harness.machine({"mlx": "cpu", "torch": "cpu"}, ("numpy",))
    assert facts["MLX device"].startswith("Device(cpu, 0)")
    assert facts["MLX float32 products"] == "float32"
    assert facts["PyTorch device"] == "cpu"
    alone = {"system", "processor", "memory", "python", "threads", "numpy"}
    assert set(harness.machine({}, ("numpy",))) == alone < set(facts)
    with pytest.raises(UserError, match="--device cuda goes with --backend torch"):
        harness.machine({"mlx": "cuda"})


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
def test_prepare_is_timed_against_tiktoken_and_weighed(
    shared_data, shared_corpus, tmp_path, capsys
):
    from bench import prepare as bench

    src = shared_corpus / "debian_sqlite_doc"
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
    from mlx_mla.model.estimate import estimate

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
    assert path.with_name(f"{path.stem}-mlx.png").stat().st_size > 10_000
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
