"""What training and preparing read, spoiled by the fuzzer.

Token shards, manifests, texts, settings, and everything in a run folder: a few cases of each by
default, thousands among the slow tests.
"""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import math
import shutil
from pathlib import Path

import fuzz
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import TINY, words
from rich.console import Console

from mlx_mla import cli, plot, prepare, train
from mlx_mla.checkpoint import ModelFolder, TrainState
from mlx_mla.data import preparation
from mlx_mla.data.manifest import MANIFEST, read_manifest
from mlx_mla.evaluation.item_store import ItemStore
from mlx_mla.evaluation.report import read_results
from mlx_mla.evaluation.scoring import Request
from mlx_mla.fields import value_of
from mlx_mla.files import SUMS, read_json, read_sums
from mlx_mla.training.metrics import read_metrics, read_samples
from mlx_mla.training.run_folder import run_config
from mlx_mla.training.tracking import Tracking

SEED = 16
TRAIN = (*TINY, "--steps", "1", "--eval-batches", "1", "--final-eval-batches", "1",
         "--sample-tokens", "0", "--seq-len", "16", "--n-layer", "1")  # fmt: skip


def ids(count: int) -> np.ndarray:
    return (np.arange(count) * 7919 % 257).astype("<u2")


def npy(tokens) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    return buffer.getvalue()


def parquet(texts) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer, row_group_size=20)
    return buffer.getvalue()


LINES = "".join(json.dumps({"text": f"line {i} of some words é"}) + "\n" for i in range(60))
TEXT = "<|endoftext|>".join(f"Document {i}.\nIts second line, naïve.\n" for i in range(60))
SOURCES = {
    "a.txt": TEXT.encode(),
    "a.jsonl": LINES.encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "a.txt.xz": lzma.compress(TEXT.encode()),
    "a.jsonl.zst": pa.compress(LINES.encode(), "zstd", asbytes=True),
    "a.parquet": parquet([f"row {i}" for i in range(60)]),
}
LLMC = np.array([20240520, 1, 900, *[0] * 253], "<i4").tobytes() + ids(900).tobytes()
SHARDS = {"a_train_1.npy": npy(ids(900)), "a_train_1.bin": LLMC, "train.bin": ids(900).tobytes()}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """A finished run of three steps, each with a checkpoint that is kept."""
    root = tmp_path_factory.mktemp("short")
    (root / "text.txt").write_text(TEXT)
    argv = [*TRAIN, "--data", str(root / "text.txt"), "--out", str(root / "run")]
    assert train.main([*argv, "--steps", "3", "--save-every", "1", "--keep", "0"]) == 0
    return root / "run"


@pytest.fixture(autouse=True, scope="module")
def small_machine(short_run):
    with fuzz.small_machine():  # with its libraries loaded, by what the fixture ran
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Folders that `prepare` has finished, and one that it has not."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "in").mkdir()
    for i in range(3):
        lines = "".join(json.dumps({"text": f"{i} {j} " + "word " * 40}) + "\n" for j in range(99))
        (root / "in" / f"{i}.jsonl").write_text(lines)
    argv = [str(root / "in"), "--tokenizer", "bytes", "--val-fraction", "0.3"]
    argv += ["--shard-tokens", "9000", "--out"]
    assert prepare.main([*argv, str(root / "whole")]) == 0
    write, left = preparation.write_shard, [3]

    def some(*args):
        left[0] -= 1
        if not left[0]:
            raise InterruptedError
        return write(*args)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(InterruptedError):
        patch.setattr(preparation, "write_shard", some)
        prepare.main([*argv, str(root / "part")])
    assert not json.loads((root / "part" / MANIFEST).read_text())["complete"]
    return root, argv


def shards(random, folder):
    name = random.choice(list(SHARDS))
    (folder / "data").mkdir()
    (folder / "data" / name).write_bytes(fuzz.mutate_bytes(random, SHARDS[name]))
    return [*TRAIN, "--data", str(folder / "data"), "--out", str(folder / "out")]


def texts(random, folder):
    name = random.choice([*SOURCES, "a.bin", "a"])
    (folder / name).write_bytes(fuzz.mutate_text(random, TEXT))
    return [*TRAIN, "--data", str(folder / name), "--out", str(folder / "out")]


def sources(random, folder):
    name = random.choice(list(SOURCES))
    whole = SOURCES[name]
    if name == "a.jsonl" and random.random() < 0.5:
        rows = [{"text": f"row {i}", "id": i} for i in range(9)]
        spoiled = b"\n".join(fuzz.mutate_json(random, row) for row in rows)
    elif name in ("a.jsonl", "a.txt"):
        spoiled = fuzz.mutate_text(random, whole.decode())
    else:
        spoiled = fuzz.mutate_bytes(random, whole)
    (folder / name).write_bytes(spoiled)
    return [str(folder / name), "--out", str(folder / "out"), "--tokenizer", "bytes",
            "--val-fraction", "0.3"]  # fmt: skip


def settings(random, folder):
    flags = ["--steps", "1", "--sample-tokens", "0", "--no-compile"]
    flags += ["--data", str(folder / "text.txt")]
    (folder / "text.txt").write_text(TEXT)
    text = (
        "seed = 5\nlearning_rate = 1e-3\nbatch_size = 2\nbackend = 'mlx'\ntrack = ''\n"
        "[model]\nn_layer = 1\nn_head = 2\nn_embd = 16\nn_positions = 16\nqk_rope_head_dim = 4\n"
        "kv_lora_ranks = [8]\nrope_theta = 10000.0\nlayer_norm_epsilon = 1e-5\n"
    )
    (folder / "c.toml").write_bytes(fuzz.mutate_toml(random, text))
    return ["--config", str(folder / "c.toml"), "--out", str(folder / "out"), *flags]


NUMBERS = words(
    "--steps --batch-size --tokens-per-step --grad-accum-steps --seq-len --seed --learning-rate",
    "--min-lr-ratio --warmup-steps --weight-decay --beta1 --beta2 --adam-epsilon --grad-clip",
    "--initializer-range --loss-chunk --activation-checkpointing --log-every --eval-every",
    "--eval-batches --final-eval-batches --save-every --keep --sample-tokens --sample-every",
    "--val-fraction --n-layer --n-head --n-embd --n-inner --n-positions --vocab-size",
    "--kv-lora-rank --q-lora-rank --qk-rope-head-dim --v-head-dim --rope-theta",
    "--layer-norm-epsilon --dropout --decay-fraction --muon-learning-rate --eval-limit",
    "--from-step",
)
ODD = ("nan", "inf", "-inf", "1e-320", "1e38", "1e39", "1e308", "1e400", "-0.0", "0.5", "", "x",
       "9" * 5000, "0x10", "1_000", "١", *map(str, fuzz.NUMBERS))  # fmt: skip


# A run that takes long because it was asked for much is no hang.
LONG = ("--steps", "--grad-accum-steps", "--tokens-per-step", "--batch-size", "--eval-batches",
        "--final-eval-batches", "--sample-tokens", "--n-layer")  # fmt: skip
SHORT = ("-1", "0", "1", "2", "nan", "inf", "1e400", "", "x", "9" * 5000, str(2**31), str(2**64))


def flags(random, folder):
    (folder / "text.txt").write_text(TEXT)
    argv = [*TRAIN, "--data", str(folder / "text.txt"), "--out", str(folder / "out")]
    for name in random.sample(NUMBERS, random.choice((1, 1, 2))):
        argv += [name, random.choice(SHORT if name in LONG else ODD)]
    return argv


def prepare_flags(random, folder):
    (folder / "a.txt").write_text(TEXT)
    argv = [str(folder / "a.txt"), "--out", str(folder / "out"), "--tokenizer", "bytes"]
    for name in random.sample(("--val-fraction", "--shard-tokens", "--workers", "--seed"), 2):
        argv += [name, random.choice(ODD)]
    odd = random.choice(fuzz.ODD_TEXTS).decode("utf-8", "replace").replace("\0", "")
    name = random.choice(("--separator", "--text-column", "--revision", "--format"))
    return [*argv, name, odd] if random.random() < 0.5 else argv


def manifests(prepared):
    root, argv = prepared

    def spoil(random, folder):
        which = random.choice(("whole", "part"))
        shutil.copytree(root / which, folder / "data")
        path = folder / "data" / MANIFEST
        path.write_bytes(fuzz.mutate_json(random, json.loads(path.read_text())))
        return [*argv, str(folder / "data")]

    return spoil


def manifests_in_training(prepared):
    spoil = manifests(prepared)

    def training(random, folder):
        spoil(random, folder)
        return [*TRAIN, "--data", str(folder / "data"), "--out", str(folder / "out")]

    return training


SAMPLES = b'{"step": 1, "text": "x"}\n' * 3


def runs(short_run):
    """A run folder with one file spoiled, to be resumed."""
    files = (
        "config.toml", "metrics.jsonl", "samples.jsonl", "latest", "tracking.json", "config.json",
        "model.safetensors", "train_state.safetensors", "train_state.json", SUMS, "tokenizer.json",
        "tokenizer_config.json",
    )  # fmt: skip

    def spoil(random, folder):
        run, name = folder / "run", random.choice(files)
        shutil.copytree(short_run, run)
        path = run / name
        if name == "samples.jsonl":
            path.write_bytes(SAMPLES)
        if not path.exists() and name != "tracking.json":
            path = run / "checkpoints" / "step-000003" / name
        if name != SUMS and random.random() < 0.8:  # else the checksums tell
            (run / "checkpoints" / "step-000003" / SUMS).unlink()
        if name == "tracking.json":
            data = fuzz.mutate_json(random, {"id": "ab12", "trackers": ["wandb"], "sent": {}})
        elif name.endswith(".jsonl") and random.random() < 0.8:
            data = fuzz.mutate_json_lines(random, path.read_bytes())
        elif name == "config.toml":
            data = fuzz.mutate_toml(random, path.read_text())
        elif name.endswith(".safetensors"):
            data = fuzz.mutate_safetensors(random, path.read_bytes())
        elif name.endswith(".json") and random.random() < 0.7:
            data = fuzz.mutate_json(random, json.loads(path.read_text()))
        else:
            data = fuzz.mutate_text(random, path.read_text())
        path.write_bytes(data)
        how = random.choice(("--resume", "--auto-resume"))
        return [how, "--out", str(run), "--steps", "4", "--sample-tokens", "0",
                "--eval-batches", "1", "--final-eval-batches", "1"]  # fmt: skip

    return spoil


def plots(short_run):
    def spoil(random, folder):
        shutil.copytree(short_run, folder / "run", ignore=shutil.ignore_patterns("checkpoints"))
        name = random.choice(("metrics.jsonl", "config.toml"))
        path = folder / "run" / name
        if name == "metrics.jsonl" and random.random() < 0.8:
            path.write_bytes(fuzz.mutate_json_lines(random, path.read_bytes()))
        else:
            path.write_bytes(fuzz.mutate_text(random, path.read_text()))
        return [str(folder / "run"), "--out", str(folder / "p.png")]

    return spoil


READERS = {
    "metrics.jsonl": read_metrics,
    "samples.jsonl": read_samples,
    "manifest.json": lambda path: read_manifest(path.parent, to_resume=True),
    "train_state.json": lambda path: value_of(TrainState, read_json(path), str(path)),
    "results.json": read_results,
    "tracking.json": lambda path: Tracking(path.parent, Console(quiet=True)),
    SUMS: lambda path: read_sums(path.parent),
    "config.json": lambda path: ModelFolder(path.parent).config,
    "config.toml": lambda path: run_config(path.parent),
    "t-0.jsonl": lambda path: StoredItems(path).read([Request((1,), ((2,),))] * 3),
}


class StoredItems(ItemStore):
    """The scores in a file by its path."""

    def __init__(self, path):
        super().__init__(path.parent, ["t", "x"])
        key = hashlib.sha256(json.dumps(self.settings).encode())
        for _ in range(3):
            key.update(repr(((1,), ((2,),))).encode())
        path.rename(path.with_name(f"t-{key.hexdigest()[:16]}.jsonl"))


def records(prepared, short_run):
    """One of our own files, read by itself."""
    last = short_run / "checkpoints" / "step-000003"
    result = {"model": "m", "tasks": {"lambada": {"acc": 0.5, "n": 2}}}
    item = {"i": 0, "logprob": [-1.5], "greedy": [True]}
    whole = {
        "manifest.json": (prepared[0] / "part" / MANIFEST).read_bytes(),
        "train_state.json": (last / "train_state.json").read_bytes(),
        "config.json": (last / "config.json").read_bytes(),
        SUMS: (last / SUMS).read_bytes(),
        "metrics.jsonl": (short_run / "metrics.jsonl").read_bytes(),
        "config.toml": (short_run / "config.toml").read_bytes(),
        "samples.jsonl": SAMPLES,
        "tracking.json": b'{"id": "ab12", "trackers": ["wandb"]}',
        "results.json": json.dumps(
            {"protocol": "standard", "models": [result], "comparisons": [{"first": "m"}]}
        ).encode(),
        "t-0.jsonl": b"".join(json.dumps(item | {"i": i}).encode() + b"\n" for i in range(3)),
    }

    def spoil(random, folder):
        name = random.choice(list(READERS))
        if name.endswith(".json"):
            data = fuzz.mutate_json(random, json.loads(whole[name]))
        elif name.endswith(".jsonl"):
            data = fuzz.mutate_json_lines(random, whole[name])
        else:
            mutate = fuzz.mutate_toml if name.endswith(".toml") else fuzz.mutate_text
            data = mutate(random, whole[name].decode())
        (folder / name).write_bytes(data)
        return [str(folder / name)]

    return spoil


def read_record(argv) -> int:
    """The readers of our own files as a command. What they accept is of the types they promise."""

    def body(argv):
        found = READERS[Path(argv[0]).name](Path(argv[0]))
        for row in found if isinstance(found, list) else []:
            assert type(row["step"]) is int and 0 <= row["step"] < 2**63
            assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
        if isinstance(found, TrainState):
            assert 0 <= found.step < 2**63 and math.isfinite(found.val_loss or 0)
        for scores in found.values() if Path(argv[0]).name == "t-0.jsonl" else []:
            assert all(isinstance(p, float) and -math.inf < p <= 0.01 for p in scores.logprob)
        return 0

    return cli.run(body, argv)


SURFACES = {
    "records": read_record, "shards": train.main, "texts": train.main, "settings": train.main,
    "flags": train.main, "runs": train.main, "manifests_in_training": train.main,
    "manifests": prepare.main, "sources": prepare.main, "prepare_flags": prepare.main,
    "plots": plot.main,
}  # fmt: skip
MADE_OF = {
    "runs": ["short_run"],
    "plots": ["short_run"],
    "manifests": ["prepared"],
    "manifests_in_training": ["prepared"],
    "records": ["prepared", "short_run"],
}


def spoiler(surface, request):
    spoil = globals()[surface]
    if surface in MADE_OF:
        spoil = spoil(*map(request.getfixturevalue, MADE_OF[surface]))
    return spoil


@pytest.mark.parametrize("surface", SURFACES)
def test_spoiled_input_is_refused_in_one_line_or_used(surface, request, tmp_path):
    main = SURFACES[surface]
    cases = {train.main: 4, read_record: 100}.get(main, 12)
    assert fuzz.fuzz(main, spoiler(surface, request), cases, SEED, tmp_path)[2] > 0


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_much_spoiled_input_is_refused_in_one_line_or_used(surface, request, fuzz_many):
    main = SURFACES[surface]
    cases = {train.main: 60, prepare.main: 400, plot.main: 80, read_record: 10_000}[main]
    name = f"{main.__module__.rpartition('.')[2]}: {surface.replace('_', ' ')}"
    assert fuzz_many(name, main, spoiler(surface, request), cases)[2] > 0
