"""The benchmarks run, keep what they have, and refuse what they cannot do. Speeds are never
asserted."""

import gc
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import refused, words, write_gpt2_model

from bench import __main__ as command
from bench import harness
from bench.timing import abba_order, turns
from mlx_mla.errors import UserError

pytest.importorskip("torch")

import mlx.core as mx
import numpy as np
import torch
from matplotlib.figure import Figure

from bench import compare_backends as compare
from bench import evaluation, trained, training
from bench.rows import Row
from bench.subjects import framework
from bench.subjects import mlx as subject_mlx
from bench.subjects import torch as subject_torch
from bench.subjects.contract import call_flops
from bench.timing import Case, time_cases
from bench.training import settings
from mlx_mla import checkpoint, train
from mlx_mla.backends.torch.caches import FixedCache, GrowingCache
from mlx_mla.evaluation.tasks import TASKS
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.estimate import estimate
from mlx_mla.model.weights import initial_weights, num_parameters

NARROW = words(
    "--quick --models gpt2-124m mla-124m --batch 1 --context 64",
    "--repetitions 1 --forward-batch 1",
)


RATES = {"matmul_flops": 1e11, "memory_bytes": 1e10}


def run(*argv) -> int:
    return command.main(words(*argv))


def document(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def compared(out: Path, *flags, code: int = 0) -> dict:
    """What compare_backends writes, with the narrowest settings."""
    assert compare.main(words(*NARROW, "--out", out, *flags)) == code
    return document(out)


MEASURES = "--measures forward first-token decoding loops"
FORWARD = "--measures forward --models mla-124m"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "report"
    compared(out, MEASURES)
    return out


@pytest.mark.slow
def test_every_measure_has_rows_for_both_backends_and_the_outside_references(report):
    rows = document(report)["rows"]
    found = {(r["measure"], r["backend"], r["model"]): r for r in rows}
    for backend, outside in (("mlx", "mlx-lm gpt2"), ("torch", "transformers GPT-2")):
        for measure in ("forward", "first token", "decoding"):
            for model in ("gpt2-124m", "mla-124m", outside):
                assert (measure, backend, model) in found
        assert ("decoding", backend, "original's decoding (mla-124m)") in found
    assert {(b, m) for x, b, m in found if x == "training"} == {
        (backend, name.format(model))
        for backend, way in (("mlx", "eager step ({})"), ("torch", "plain PyTorch loop ({})"))
        for name in ("{}", way)
        for model in ("gpt2-124m", "mla-124m")
    }
    for r in rows:
        assert r["status"] == "ok"
        t = r["tokens_per_sec"]
        assert 0 < t["min"] <= t["median"] <= t["max"]
        assert len(t["values"]) == 1
        assert r["roofline"] > 0
        waits = r["measure"] == "decoding" and r["backend"] == "mlx" and r["cache"] != "none"
        assert (r["waited_ms"] is not None) == waits
    (latent,) = [r for r in rows if (r["backend"], r["cache"]) == ("torch", "latent")
                 and r["measure"] == "decoding"]  # fmt: skip
    whole = found["decoding", "torch", "gpt2-124m"]
    assert whole["cache_bytes_per_token"] == 4 * latent["cache_bytes_per_token"]
    assert whole["cache_bytes"] == 4 * latent["cache_bytes"]


@pytest.mark.slow
def test_the_report_has_parity_first_then_tables_and_plots(report):
    found = document(report)["parity"]
    assert {(f["weights"], f["backend"], f["model"]) for f in found} == {
        ("gpt2-124m", "torch", "gpt2-124m"),
        ("gpt2-124m", "mlx", "mlx-lm gpt2"),
        ("gpt2-124m", "torch", "transformers GPT-2"),
        ("mla-124m", "torch", "mla-124m"),
    }
    text = (report / "report.md").read_text()
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings[:5] == ["Parity", "Forward", "First token", "Decoding", "Training"]
    for f in found:
        # Different kernels round differently, so a difference of exactly nothing was not measured.
        assert 0 < f["largest_logit_difference"] <= f["allowed"] == 1e-3
        assert f["ok"]
        shown = f"| {f['backend']} {f['model']} | mlx {f['weights']} | {f['positions']} "
        assert f"{shown}| {f['largest_logit_difference']:.2g} |" in text
    for part in ("| 1.00x |", "GFLOP/s", "x plain PyTorch loop |", "x eager step, "):
        assert part in text
    for name in ("forward", "first", "decoding-mlx", "decoding-torch", "training", "cache"):
        assert f"]({name}.png)" in text
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_resuming_keeps_rows_and_measures_the_missing(report, capfd):
    stored = document(report)
    before = stored["rows"]
    (report / "results.json").write_text(json.dumps({**stored, "rows": before[:-3]}))
    after = compared(report, MEASURES, "--resume")["rows"]
    assert after[:-3] == before[:-3]
    keys = ("measure", "backend", "model", "cache", "batch", "context")
    assert [[r[k] for k in keys] for r in after[-3:]] == [[r[k] for k in keys] for r in before[-3:]]


MLA_TO_WEIGH = {"n_layer": 12, "n_head": 4, "n_embd": 64, "n_positions": 4200, "vocab_size": 300}
BATCH, CONTEXT = 4, 4000


def _weighed(attention: str):
    """A model whose cache is most of what decoding holds."""
    rank = {} if attention == "mha" else {"kv_lora_rank": 32}
    config = ModelConfig(attention=attention, **MLA_TO_WEIGH, **rank).resolved()
    return config, initial_weights(config, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "kind", "width"),
    [("mha", "materialized", 2 * 64), ("mla", "materialized", 2 * 64), ("mla", "latent", 32)],
)
@pytest.mark.parametrize("others", [0, 300_000_000])
def test_peak_memory_is_the_subjects_own(attention, kind, width, others):
    """The weights, the cache once, and a little to compute with, whatever else is in memory."""
    config, weights = _weighed(attention)
    gc.collect()  # what earlier tests left is freed now, and not meanwhile
    mx.clear_cache()
    resident = mx.ones((others // 4,))
    mx.eval(resident)
    subject = framework("mlx").load("weighed", config, weights, "float32", "cpu")
    held = 12 * BATCH * 4096 * width * 4  # layers x rows x room for 4,096 tokens x values x bytes
    held += sum(w.nbytes for w in weights.values())
    assert subject.decode(BATCH, CONTEXT, 2, kind).cache_bytes > 0.9 * held - 10_000_000
    peak = subject.memory.peak()
    # Attention of one layer of twelve may copy its keys and values, scores are small.
    assert held <= peak < 1.35 * held
    del subject, resident
    framework("mlx").release()


def test_actions_take_turns_and_loaded_subjects_go_there_and_back():
    said = []
    found = turns({"a": lambda: said.append("a") or len(said), "b": lambda: said.append("b")}, 2)
    assert (said, found) == (["a", "b"] * 3, {"a": [3, 5], "b": [None, None]})
    assert list(abba_order("ab", 5)) == [("a", 3), ("b", 5), ("a", 2)]
    assert list(abba_order("ab", 1)) == [("a", 1), ("b", 1)]


def test_one_subject_is_in_memory_at_a_time():
    alive: list[str] = []
    order: list[str] = []

    class Loaded:
        def __init__(self, name):
            assert not alive, f"{name} beside {alive}"
            self.name, self.memory = name, self
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
        row = Row(measure="forward", backend="torch", model=name, batch=1, context=1)
        return Case(row, lambda: Loaded(name), run, 1)

    found = time_cases([case("a"), case("bb"), case("ccc")], 4)
    assert [r.peak_bytes for r in found] == [1, 2, 3]
    assert [len(r.tokens_per_sec["values"]) for r in found] == [4, 4, 4]
    assert not alive
    visits = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert visits == ["a", "bb", "ccc", "bb", "a"]


def test_a_trainer_gives_its_memory_back():
    config = settings("nano", dtype="float32", batch_size=1, seq_len=64, compile=False)
    ids = np.ones((1, 64), np.int32)
    framework("mlx").release()
    before = mx.get_active_memory()
    for _ in range(2):
        trainer = framework("mlx").trainer(config, "cpu")
        trainer.step(ids, ids)
        # AdamW: weights, gradients and two moments, all in float32.
        weights = 4 * num_parameters(config.model)
        assert 3 * weights < trainer.memory.peak() < 20 * weights
        del trainer
        framework("mlx").release()
        assert mx.get_active_memory() - before < 0.1 * weights


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["latent", "materialized"])
def test_mlx_decodes_with_what_generate_decodes_with(batch, kind):
    """The same tokens as mlx-lm's own loops give after the same cache, pipelined or waited for."""
    config, weights = _weighed("mla")
    subject = framework("mlx").load("weighed", config, weights, "float32", "cpu")
    subject.use(kind)
    cache = subject._filled(batch, 700, 8)
    assert {type(c).__name__ for c in cache} == {"KVCache" if batch == 1 else "BatchKVCache"}
    assert all(c.keys.shape[2] == 768 for c in cache)  # multiples of 256, as mlx-lm's grow
    tokens = np.array(list(subject._tokens(batch, cache, 5))).reshape(5, batch)
    cache, y = subject._filled(batch, 700, 8), mx.zeros((batch, 1), mx.int32)
    for row in tokens:
        y = mx.argmax(subject.network(y, cache=cache)[:, -1], axis=-1, keepdims=True)
        assert y[:, 0].tolist() == row.tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_torch_decodes_on_mps_with_the_cache_that_generate_has_there(batch):
    """Of fixed shape; the numbers are those of the cache that grows."""
    config, weights = _weighed("mla")
    subject = framework("torch").load("weighed", config, weights, "float32", "cpu")
    subject.use("latent")
    logits = {}
    for fixed, cache_type in ((False, GrowingCache), (True, FixedCache)):
        subject.fixed_shapes = fixed
        with torch.inference_mode():
            cache = subject._filled(batch, 50, 3)
            assert isinstance(cache, cache_type)
            y = torch.zeros((batch, 1), dtype=torch.long)
            mask = subject._mask(batch, cache, 51)
            out = subject.network(y, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits[fixed] = out.logits
        timed = subject.decode(batch, 50, 2, "latent")
        length = 256 if fixed else 52
        assert timed.cache_bytes == 12 * batch * length * 32 * 4
    assert (logits[True] - logits[False]).abs().max() < 1e-5


def test_the_first_token_needs_the_head_once():
    """Counted by hand: a block's matrices for every token, the head's for the last."""
    c = ModelConfig(attention="mha", n_layer=2, n_head=2, n_embd=8, n_positions=32, vocab_size=100)
    c = c.resolved()
    matrices = 2 * (8 * 24 + 8 * 8 + 2 * 8 * 32)
    scores = 2 * 2 * 2 * 8 * 5.5  # layers x (scores and values) x a multiply-add x width x keys
    found = call_flops("first token", c, "materialized", 1, 10)
    assert found == 10 * (2 * matrices + scores) + 2 * 8 * 100


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoded_token_is_multiplied_by_the_head_but_only_looked_up_in_the_embedding(tied):
    c = ModelConfig(
        attention="mha", n_layer=2, n_head=2, n_embd=8, n_positions=32, vocab_size=100,
        tie_word_embeddings=tied,
    ).resolved()  # fmt: skip
    matrices = 2 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 8 * 100
    scores = 2 * 2 * 2 * 8  # for a cached token
    assert call_flops("decoding", c, "materialized", 3, 10) == 3 * (2 * matrices + 10 * scores)


def test_a_change_of_perplexity_has_the_error_of_a_ratio(tiny_run, rng, monkeypatch):
    """As resampling the windows finds it, also where the change is large."""
    base = rng.normal(3, 0.3, 400)
    scored = [base, *(base + rng.normal(mean, 0.3, 400) for mean in (0.5, 0.01, 0.02, 0.8, 2.0, 0))]
    left = iter(scored)
    monkeypatch.setattr(trained, "window_losses", lambda *_: next(left))
    monkeypatch.setattr(trained, "cache_bytes", lambda *_: 1.0)
    folder = checkpoint.ModelFolder(checkpoint.model_folder(tiny_run))
    rows = trained.quantized(SimpleNamespace(windows=2), "m", folder, np.arange(200) % 256)
    for row, losses in zip(rows, scored):
        changes = losses - base
        drawn = rng.choice(changes, (4000, 400)).mean(axis=1)
        assert row["change"] == pytest.approx(np.exp(changes.mean()) - 1)
        assert row["error"] == pytest.approx(np.exp(drawn).std(), rel=0.1)


def test_a_benchmark_stops_after_its_minutes_and_resumes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(subject_mlx, "rates", lambda *_: RATES)
    flags = f"{FORWARD} --backends mlx --resume --minutes"
    assert compared(tmp_path, f"{flags} 1e-9", code=harness.UNFINISHED)["rows"] == []
    assert "--resume continues" in capfd.readouterr().err
    assert len(compared(tmp_path, f"{flags} 60")["rows"]) == 2


def test_a_roofline_is_taken_of_the_rates_beside_its_row():
    for flops, share in ((4e11, 0.25), (1.25e11, 0.8)):
        row = Row(measure="forward", backend="mlx", model="m", batch=1, context=1, ms=10.0)
        row.flops, row.bytes = 1e9, 1e6
        row.tokens_per_sec = {"median": 1.0, "min": 1.0, "max": 1.0}
        row.rates = {"matmul_flops": flops, "memory_bytes": 1e9}
        row.set_roofline()
        assert row.roofline == pytest.approx(share)


@pytest.mark.slow
def test_a_subject_that_computes_something_else_is_not_timed(tmp_path, monkeypatch, capfd):
    real = subject_torch.load

    def wrong(model, config, weights, *rest):
        weights = {k: w * (1.1 if "ln_f" in k else 1) for k, w in weights.items()}
        return real(model, config, weights, *rest)

    monkeypatch.setattr(subject_torch, "load", wrong)
    found = compared(tmp_path, FORWARD)
    (verdict,) = found["parity"]
    assert (verdict["backend"], verdict["ok"]) == ("torch", False)
    assert verdict["largest_logit_difference"] > verdict["allowed"]
    assert "| not timed |" in (tmp_path / "report.md").read_text()
    assert {r["backend"] for r in found["rows"]} == {"mlx"}


@pytest.mark.slow
def test_running_out_of_memory_marks_the_row_and_continues(tmp_path, monkeypatch, capfd):
    def full(self, ids):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(subject_torch.TorchSubject, "forward", full)
    status = {r["backend"]: r["status"] for r in compared(tmp_path, FORWARD)["rows"]}
    assert status == {"mlx": "ok", "torch": "out of memory"}
    assert "out of memory" in (tmp_path / "report.md").read_text()


def test_bad_input_gets_one_line(tmp_path, capsys, tiny_run):
    def no(*argv):
        return refused(capsys, *argv, command=compare.main)

    assert "did you mean 'mla-124m'" in no("--models", "mla-124")
    assert "invalid choice 'jax'" in no("--backends", "jax")
    assert "--repetitions must be at least 1" in no("--repetitions", "0")
    assert "--batch must be at least 1" in no("--batch", "1", "0")
    assert "--models needs at least one value" in no("--models")
    assert "--resume needs --out" in no("--resume")
    assert "--minutes needs --out" in no("--minutes", "5")
    stored = tmp_path / "results.json"
    stored.write_text("{}")
    assert "holds results; add --resume" in no("--out", tmp_path)
    assert "not results of a benchmark" in no("--out", tmp_path, "--resume")
    another = {"benchmark": "compare", "machine": {}, "settings": {"dtype": "bfloat16"}, "rows": []}
    stored.write_text(json.dumps(another))
    assert "measured with dtype bfloat16, not float32" in no("--out", tmp_path, "--resume")
    stored.write_text(json.dumps({**another, "benchmark": "trained"}))
    assert "results of another benchmark" in no("--out", tmp_path, "--resume")
    folder = shutil.copytree(tiny_run / "checkpoints/step-000040", tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    quantized = {**config, "quantization": {"bits": 4, "group_size": 32}}
    (folder / "config.json").write_text(json.dumps(quantized))
    assert "which only MLX reads; compare the folder it was made from" in no("--models", folder)


def test_the_command_lists_the_benchmarks_and_refuses_others(capsys):
    assert run() == run("--help") == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in (*harness.REGISTRY, "report"))
    assert "no benchmark 'cores'; take one of compare, core" in refused(
        capsys, "cores", command=command.main
    )


STORED = Path(__file__).parent.parent / "bench" / "results"
# A study keeps its runs; what holds for those is in test_study.py.
RESULTS = sorted(p for p in STORED.glob("**/*.json") if '"runs":' not in p.read_text())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_stored_reports_say_what_their_results_say(path, tmp_path, capsys):
    copy = Path(shutil.copy(path, tmp_path))
    assert run("report", copy) == 0
    assert copy.read_bytes() == path.read_bytes()
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {p.name for p in path.parent.iterdir()}
    assert (tmp_path / "report.md").read_text() == path.with_name("report.md").read_text()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_no_picture_of_stored_results_is_empty(path):
    benchmark, found = harness.read(path)
    for name, picture in benchmark.figures(found).items():
        figure = Figure(figsize=picture.size)
        picture.paint(figure)
        shown = [axes for axes in figure.axes if axes.axison]
        assert shown and all(len(axes.lines) > 1 for axes in shown), name


def test_results_with_a_name_of_their_own_get_a_report_of_that_name(tmp_path, capsys):
    source = next(p for p in RESULTS if p.parent.name.endswith("_convert"))
    copy = shutil.copy(source, tmp_path / "some-machine_convert.json")
    assert run("report", copy) == 0
    names = {
        "some-machine_convert.json",
        "some-machine_convert.md",
        "some-machine_convert-convert.png",
    }
    assert {p.name for p in tmp_path.iterdir()} == names


def numbers(value, path=()):
    """The path to every number of a document."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_damaged_results_are_refused_before_anything_is_written(path, tmp_path, capsys):
    """Whatever a number of the first row becomes."""
    rows = next(key for key in ("cells", "rows") if key in json.loads(path.read_text()))
    copy, good = tmp_path / "results.json", Path(shutil.copy(path, tmp_path / "good.json"))
    places = [p for p in numbers(json.loads(path.read_text())[rows][:1]) if p[-1] != "repetitions"]
    assert places
    for place in places:
        for wrong in (True, math.nan, 1e308, -1e308, "3", [], {}):
            broken = json.loads(path.read_text())
            holder = broken[rows]
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = wrong
            copy.write_text(json.dumps(broken))
            with pytest.raises(UserError, match=rf"{copy}: {rows}\[0\].*{place[1]}.*measure again"):
                harness.read(copy)
    assert str(copy) in refused(capsys, "report", good, copy, command=command.main)
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "good.json"}


def test_a_document_names_what_the_frameworks_found_on_the_devices_that_were_measured():
    found = harness.machine({"mlx": "cpu", "torch": "cpu"}, ("numpy",))
    assert found["MLX device"].startswith("Device(cpu, 0)")
    assert found["MLX float32 products"] == "float32"
    assert found["PyTorch device"] == "cpu"
    alone = {"system", "processor", "memory", "python", "threads", "numpy"}
    assert set(harness.machine({}, ("numpy",))) == alone < set(found)
    with pytest.raises(UserError, match="--device cuda requires --backend torch"):
        harness.machine({"mlx": "cuda"})


def test_the_report_of_something_else_is_refused(tmp_path, capsys):
    path = tmp_path / "some.json"
    for text, said in (
        (None, "no such file"),
        ("{", "JSON"),
        ("[]", "JSON"),
        ('{"machine": {}}', "not results of a benchmark"),
        ('{"machine": {}, "settings": {}, "report": "os.path"}', "does not name its benchmark"),
        ('{"machine": {}, "settings": {}, "benchmark": "decode"}', "rows is missing"),
    ):
        if text is not None:
            path.write_text(text)
        assert said in refused(capsys, "report", path, command=command.main)


@pytest.mark.slow
def test_core_and_decode_are_suites_of_the_comparison(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(subject_mlx, "rates", lambda *_: RATES)  # seconds, four times
    monkeypatch.setattr(mx, "compile", lambda f, **_: f)  # half a minute in the C++ compiler
    quick = "--quick --repetitions 1 --models mla-124m"
    assert run("core", f"{quick} --context 256 --out", tmp_path / "core") == 0
    found = {(r["measure"], r["model"], r["cache"]) for r in document(tmp_path / "core")["rows"]}
    assert found == {
        ("training", "mla-124m", None), ("training", "eager step (mla-124m)", None),
        ("decoding", "mla-124m", "latent"), ("decoding", "mla-124m", "materialized"),
        ("decoding", "original's decoding (mla-124m)", "none"), ("save", "mla-124m", None),
    }  # fmt: skip
    out = tmp_path / "decode"
    flags = f"{quick} gpt2-124m --backends mlx --batch 1 3 --context 256 768 --uncached none --out"
    assert run("decode", flags, out) == 0
    found = document(out)["rows"]
    cells = {
        (r["batch"], r["context"], r["model"], r["cache"])
        for r in found
        if r["measure"] == "decoding"
    }
    kinds = (("gpt2-124m", "materialized"), ("mla-124m", "latent"), ("mla-124m", "materialized"))
    assert cells == {(b, c, *kind) for b in (1, 3) for c in (16, 48) for kind in kinds}
    paths = {(r["context"], r["new"], r["path"]) for r in found if r["measure"] == "chunk"}
    ways = ("absorbed", "expanded", "chosen")
    assert paths == {(c, n, p) for c in (16, 48) for n in (2, 8, 32) for p in ways}
    text = (out / "report.md").read_text()
    for part in ("On latents a step takes at most", "gain over expanded"):
        assert part in text
    assert run("decode", flags, out, "--resume") == 0
    assert document(out)["rows"] == found


@pytest.mark.slow
def test_evaluation_does_equal_work(shared_data, tmp_path, capfd):
    pytest.importorskip("lm_eval", reason="needs lm_eval, in the extra named referees")
    folder = write_gpt2_model(tmp_path / "model", shared_data, n_embd=16, kv_lora_rank=4)
    flags = ["--data-dir", shared_data, "--model", folder, "--limit 12 --batch-size 4"]
    assert run("evaluation", *flags, "--out", tmp_path / "out") == 0
    found = document(tmp_path / "out")["rows"]
    assert len(found) == 6
    for task in ("hellaswag", "lambada"):
        rows = [r for r in found if r["task"] == task]
        assert {r["subject"] for r in rows} == {"lm_eval hf", "mlx_mla mlx", "mlx_mla torch"}
        assert {r["items"] for r in rows} == {12}
        assert len({r["acc"] for r in rows}) == 1
    assert "| against lm_eval |" in (tmp_path / "out" / "report.md").read_text()


def test_evaluation_refuses(shared_data, capsys):
    pytest.importorskip("lm_eval", reason="needs lm_eval, in the extra named referees")

    def no(*argv):
        own = ("evaluation", "--data-dir", shared_data, *argv)
        return refused(capsys, *own, command=command.main)

    assert "wikitext2 has too few items" in no("--tasks", "wikitext2")
    assert "must be at least 1" in no("--limit", "0")
    assert "did you mean 'lambada'?" in no("--tasks", "lamda")


@pytest.mark.slow
def test_convert_measures_every_cell_and_resumes(text_file, tmp_path, capfd):
    source, out = tmp_path / "run", tmp_path / "out"
    small = "--attention mha --n-layer 2 --n-head 2 --n-embd 16 --n-positions 32 --steps 40"
    more = "--batch-size 4 --eval-every 0 --backend torch --device cpu --sample-tokens 0"
    assert train.main(words(small, more, "--data", text_file, "--out", source)) == 0
    flags = ["convert", "--model", source, "--out", out, "--fractions 1 0.25 --finetune 0.2"]
    flags += ["--finetune-fractions 0.25 --calibration-tokens 2000"]
    assert run(*flags) == 0
    stored = document(out)
    cells = stored["cells"]
    named = {(c["rank"], c["method"], c["budget"], c["heal"], c["teacher"]): c for c in cells}
    assert len(named) == len(cells) == 2 + 4 + 2 + 1
    for method in ("fitted to a text", "without a text"):
        assert abs(named[16, method, False, 0.0, False]["change"]) < 0.01  # full rank is exact
        assert named[4, method, False, 0.0, False]["stderr"] > 0
    tuned, before = (
        named[4, "fitted to a text", True, share, False]["change"] for share in (0.2, 0.0)
    )
    assert tuned < before
    assert named[16, "the MHA model", False, 0.2, False]["change"] < 0
    (out / "results.json").write_text(json.dumps({**stored, "cells": cells[1:]}))
    assert run(*flags, "--resume") == 0
    assert document(out)["cells"] == [*cells[1:], cells[0]]
    assert run("convert", "--model", tmp_path / "nowhere") == 2


@pytest.mark.slow
def test_training_measures_memory_and_plans(tmp_path, capsys):
    assert run("training", "--quick", "--out", tmp_path / "out") == 0
    held = document(tmp_path / "out")["memory"]
    assert [r["checkpoint_every"] for r in held] == [0, 1]
    for r in held:
        parts = ("state_bytes", "gradient_bytes", "activation_bytes")
        assert sum(r["measured"][part] for part in parts) == r["measured"]["total_bytes"]
        assert r["measured"]["total_bytes"] == pytest.approx(r["estimate"]["total_bytes"], rel=0.3)
    assert "| nano | bfloat16 |" in capsys.readouterr().out


def test_a_plan_puts_in_what_fits():
    config = training.settings("mla-124m", dtype="float32", seq_len=1024)
    batch = training.largest_batch(config, 32e9)
    totals = [
        estimate(training.settings("mla-124m", dtype="float32", batch_size=b), True)
        for b in (batch, 2 * batch)
    ]
    assert totals[0].total_bytes <= 32e9 < totals[1].total_bytes


def test_trained_refuses_what_does_not_fit(tiny_run, tmp_path, text_file, capsys):
    (tmp_path / "short.txt").write_text("a short text " * 20)
    argv = ("trained", "--models", tiny_run, "--draft", tiny_run, "--out", tmp_path / "out")
    said = refused(capsys, *argv, "--text", tmp_path / "short.txt", command=command.main)
    assert "its held-out part has 26 tokens, and a window of" in said
    said = refused(capsys, *argv, "--text", text_file, "--tokens 63", command=command.main)
    assert "--tokens 63" in said and "two at least are for a prompt" in said


def test_an_item_is_a_line_whatever_else_ends_one(tmp_path):
    path = tmp_path / "data" / TASKS["lambada"].files["standard"]
    path.parent.mkdir(parents=True)
    items = [json.dumps({"text": f"a{end}b"}, ensure_ascii=False) for end in "\u2028\x85x"]
    path.write_text("\n".join(items) + "\n", encoding="utf-8")
    chosen = evaluation.sample(
        evaluation.Evaluation(data_dir=tmp_path / "data", limit=3), "lambada", tmp_path / "work"
    )
    text = (chosen / TASKS["lambada"].files["standard"]).read_text(encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_trained_measures_quantization_and_drafts(tiny_run, text_file, tmp_path, capfd):
    flags = ["--models", tiny_run, "--text", text_file, "--draft", tiny_run]
    assert run("trained", *flags, "--windows 4 --tokens 8 --out", tmp_path / "out") == 0
    found = document(tmp_path / "out")
    assert found["quality"][0]["change"] == 0
    assert {(r["weight_bits"], r["cache_bits"]) for r in found["quality"]} >= {
        (None, None),
        (8, None),
    }
    assert [r["guesses"] for r in found["speed"]] == [0, 2, 3, 4, 6]
    assert all(r["same_text"] for r in found["speed"])
