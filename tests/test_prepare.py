"""`python -m mlx_mla.prepare`: every document once, the same bytes whatever happens on the way, and
clear refusals."""

import gzip
import itertools
import json
import lzma
import random
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import file_size_limit, python, words
from helpers import refused as refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mla import prepare
from mlx_mla.data import documents, preparation
from mlx_mla.data.shards import open_folder
from mlx_mla.data.tokenizer import get_tokenizer

SPLITS = ("train", "val")


USUAL = "--tokenizer bytes --val-fraction 0.3"


def run(src, out, *flags) -> int:
    return prepare.main(words(src, "--out", out, USUAL, *flags))


def refused(capsys, src, out, *flags) -> str:
    return refusal(capsys, src, "--out", out, USUAL, *flags, command=prepare.main)


def write_lines(path: Path, texts, key: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)).encode()
    packed = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda d: pa.compress(d, "zstd", asbytes=True),
    }
    path.write_bytes(packed.get(path.suffix, bytes)(data))
    return path


def read_tokens(path: Path) -> np.ndarray:
    """An independent reading of a shard: NumPy's own, or llm.c's layout by hand."""
    if path.suffix == ".npy":
        return np.load(path)
    data = path.read_bytes()
    magic, version, count = struct.unpack("<3i", data[:12])
    assert (magic, version, len(data)) == (20240520, 1, 1024 + 2 * count)
    return np.frombuffer(data[1024:], "<u2")


def read_documents(out: Path, split: str, eot: int = 256, decode=None) -> list[str]:
    found = []
    for path in sorted(p for p in out.iterdir() if split in p.name):
        tokens = read_tokens(path)
        assert tokens.dtype == np.uint16
        assert tokens[0] == eot
        for part in np.split(tokens, np.flatnonzero(tokens == eot))[1:]:
            found.append(
                decode(part[1:].tolist()) if decode else bytes(part[1:].astype(np.uint8)).decode()
            )
    return found


def content(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """12 files of all kinds with 1,300 documents, some of them empty."""
    folder, chance = tmp_path_factory.mktemp("many"), random.Random(5)
    words = [
        "the", "cat", "sat", "on", "a", "mat", "and", "Ænima", "été", "日本", "wrote", "123",
        "words",
    ]  # fmt: skip

    def text() -> str:
        return " ".join(chance.choices(words, k=chance.choice([0, 3, 20, 200])))

    endings = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
    for i in range(8):
        write_lines(
            folder / f"sub{i % 3}" / f"lines{i}{endings[i % 4]}", [text() for _ in range(100)]
        )
    for i in range(2):
        rows = [text() if j % 10 else None for j in range(200)]
        pq.write_table(
            pa.table({"text": rows, "n": range(200)}), folder / f"p{i}.parquet", row_group_size=37
        )
    (folder / "stories.txt").write_text(
        "<|endoftext|>".join([*(text() for _ in range(99)), "the end"]), encoding="utf-8"
    )
    (folder / "one.txt.gz").write_bytes(gzip.compress(b"a whole file is one document\n"))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


SHARDS = ("--shard-tokens", "20000")


@pytest.fixture(scope="module")
def prepared(many, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    assert run(many, out, *SHARDS) == 0
    return out


def source_documents(many: Path) -> list[str]:
    """All documents, read in the plainest way."""
    texts: list[str | None] = ["a whole file is one document\n"]
    for path in many.rglob("*.jsonl*"):
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        with opener(path, "rb") as file:
            data = file.read()
        if path.suffix == ".zst":
            data = pa.input_stream(str(path), "zstd").read()
        texts += [json.loads(line)["text"] for line in data.splitlines()]
    for path in many.glob("*.parquet"):
        texts += pq.read_table(path)["text"].to_pylist()
    texts += (many / "stories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    return [t for t in texts if t and t.strip()]


def test_every_document_is_there_once_and_nothing_else(many, prepared, capsys):
    train, val = (read_documents(prepared, split) for split in SPLITS)
    assert Counter(train + val) == Counter(source_documents(many))
    assert not set(train) & set(val)  # equal documents fall on one side
    assert 0.2 < len(val) / len(train + val) < 0.4
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["complete"]
    for split, texts in zip(SPLITS, (train, val)):
        assert sum(s["documents"] for s in manifest["shards"] if s["split"] == split) == len(texts)
    assert manifest["empty_documents"] == 1301 - len(train + val)
    assert all(s["tokens"] <= 20_000 for s in manifest["shards"])
    assert len(manifest["shards"]) > 5
    # Run again: nothing is done, and nothing changes.
    before = content(prepared)
    assert run(many, prepared, *SHARDS) == 0
    assert f"{len(train):,} documents" in capsys.readouterr().out
    assert content(prepared) == before


def test_names_are_those_that_build_nanogpt_and_llm_c_look_for(many, prepared, tmp_path):
    assert {p.name for p in prepared.iterdir() if "val" in p.name} >= {"tokens_val_000000.npy"}
    assert "tokens_train_000001.npy" in content(prepared)
    assert run(many, tmp_path / "c", *SHARDS, "--format", "llmc") == 0
    assert (tmp_path / "c" / "tokens_val_000000.bin").is_file()
    for split in SPLITS:
        assert read_documents(tmp_path / "c", split) == read_documents(prepared, split)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(many, prepared, tmp_path, workers):
    assert run(many, tmp_path / "out", *SHARDS, "--workers", workers) == 0
    assert content(tmp_path / "out") == content(prepared)


def test_the_seed_changes_the_order_alone(many, prepared, tmp_path):
    assert run(many, tmp_path / "out", *SHARDS, "--seed", "1") == 0
    for split in SPLITS:
        a, b = read_documents(prepared, split), read_documents(tmp_path / "out", split)
        assert a != b
        assert sorted(a) == sorted(b)


def test_documents_are_shuffled_within_and_across_files(tmp_path):
    for i in range(4):
        write_lines(tmp_path / "in" / f"{i}.jsonl", [f"{i} {j}" for j in range(200)])
    assert run(tmp_path / "in", tmp_path / "out") == 0
    files = [int(d.split()[0]) for d in read_documents(tmp_path / "out", "train")]
    assert sum(a != b for a, b in itertools.pairwise(files)) > len(files) / 2


@settings(max_examples=8)
@given(
    texts=st.lists(st.text(max_size=40).map(lambda t: "x" + t), min_size=1, max_size=60),
    shard_tokens=st.integers(1, 300),
    ending=st.sampled_from([".jsonl", ".jsonl.zst"]),
)
def test_no_document_is_lost_whatever_they_are(tmp_path_factory, texts, shard_tokens, ending):
    folder = tmp_path_factory.mktemp("some")
    texts = [*texts, "a train document", "a val document 3"]
    write_lines(folder / f"in{ending}", texts)
    flags = ("--val-fraction 0.5 --shard-tokens", shard_tokens)
    assert run(folder / f"in{ending}", folder / "out", *flags) == 0
    found = [d for split in SPLITS for d in read_documents(folder / "out", split)]
    # A half of a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD.
    expected = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
    assert Counter(found) == Counter(expected)


@pytest.mark.parametrize("limit", [1, 7, 64, 1 << 20])
def test_blocks_are_the_same_wherever_reading_starts(many, limit):
    for source in documents.find_sources(str(many), documents.Reading())[0]:
        blocks = list(source.blocks(None, limit))[:40]
        for i, block in enumerate(blocks[:-1]):
            if i % 7 == 0:
                again = next(iter(source.blocks(block.end, limit)))
                assert (again.end, again.documents()) == (
                    blocks[i + 1].end,
                    blocks[i + 1].documents(),
                )


def test_parquet_goes_on_within_row_groups_of_any_size(tmp_path):
    path, texts = tmp_path / "a.parquet", [f"row {i}" for i in range(110)]
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for first, last in ((0, 100), (100, 103), (103, 104), (104, 110)):
            writer.write_table(pa.table({"text": texts[first:last]}))
    (source,), _ = documents.find_sources(str(path), documents.Reading())
    for start in range(111):
        rest = [d for block in source.blocks(start, 20) for d in block.documents()]
        assert rest == texts[start:]


def test_a_long_text_is_cut_at_line_breaks_and_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(documents.TextSource, "longest", 100)
    path = tmp_path / "a.txt"
    text = "".join("é" * n + "\n" for n in (10, 20, 30, 300, 5))
    path.write_text(text, encoding="utf-8")
    (source,), _ = documents.find_sources(str(path), documents.Reading())
    parts = [d for block in source.blocks(None, 64) for d in block.documents()]
    assert "".join(parts) == text
    assert parts[0] == "é" * 10 + "\n" + "é" * 20 + "\n"
    assert max(len(p.encode()) for p in parts) <= 100


def test_a_text_that_is_read_in_blocks_of_just_the_longest_is_cut_at_characters(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(documents.TextSource, "longest", 2 << 20)
    path = tmp_path / "a.txt"
    text = "x" + "é" * (2 << 20)
    path.write_text(text, encoding="utf-8")
    (source,), _ = documents.find_sources(str(path), documents.Reading())
    parts = [d for block in source.blocks(None, 1 << 20) for d in block.documents()]
    assert [len(part.encode()) for part in parts] == [(2 << 20) - 1, (2 << 20) - 0, 2]


# --- killed, and gone on with ---


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 3, 6])
def test_stopped_between_any_two_writes_it_goes_on_to_the_same_bytes(
    many, prepared, tmp_path, monkeypatch, at
):
    """Stops at the n-th write of a shard or of the manifest, each time a little further on."""
    writes = {"left": 0}

    def counting(function):
        def call(*args):
            writes["left"] -= 1
            if writes["left"] < 0:
                raise Killed
            return function(*args)

        return call

    monkeypatch.setattr(preparation, "write_shard", counting(preparation.write_shard))
    monkeypatch.setattr(preparation, "write_text", counting(preparation.write_text))
    for lives in range(1, 60):
        writes["left"] = at + lives
        try:
            assert run(many, tmp_path / "out", *SHARDS, "--workers", 1 + lives % 3) == 0
            break
        except Killed:
            pass
    assert lives > 3
    assert content(tmp_path / "out") == content(prepared)


def test_a_full_disk_is_told_and_what_was_written_is_used_again(many, prepared, tmp_path, capsys):
    largest = max(p.stat().st_size for p in prepared.glob("*train*"))
    with file_size_limit(largest - 1):
        said = refused(capsys, many, tmp_path / "out", *SHARDS)
    assert "could not be written: File too large; run the command again to resume" in said
    assert run(many, tmp_path / "out", *SHARDS) == 0
    assert content(tmp_path / "out") == content(prepared)


# --- the hub ---


@pytest.fixture
def hub(many, monkeypatch):
    """`load_dataset` as it is, on the parquet files of `many` instead of a dataset's on the hub."""
    datasets = pytest.importorskip("datasets")
    real = datasets.load_dataset
    files = [str(p) for p in sorted(many.glob("*.parquet"))]

    def load(name, config, split, streaming, revision):
        assert (name, config, split, streaming, revision) == (
            "owner/name", "sample-10BT", "train", True, "c0ffee",
        )  # fmt: skip
        return real("parquet", data_files=files, split=split, streaming=streaming)

    class Api:
        def dataset_info(self, name, revision):
            return type("Info", (), {"sha": "c0ffee"})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)


def test_a_dataset_of_the_hub_is_streamed_and_gone_on_with(
    many, hub, tmp_path, monkeypatch, capsys
):
    src = "owner/name:sample-10BT"
    assert run(src, tmp_path / "a", "--shard-tokens", "5000") == 0
    texts = [
        t
        for p in many.glob("*.parquet")
        for t in pq.read_table(p)["text"].to_pylist()
        if t and t.strip()
    ]
    assert Counter(d for s in SPLITS for d in read_documents(tmp_path / "a", s)) == Counter(texts)
    assert (
        json.loads((tmp_path / "a" / "manifest.json").read_text())["sources"][1][0]
        == f"{src}@c0ffee#00001"
    )

    real, left = preparation.write_shard, {"n": 0}

    def stopping(*args):
        left["n"] -= 1
        if left["n"] < 0:
            raise Killed
        return real(*args)

    monkeypatch.setattr(preparation, "write_shard", stopping)
    for left["n"] in (3, 4, 5, 1000):
        try:
            assert run(src, tmp_path / "b", "--shard-tokens", "5000") == 0
        except Killed:
            assert left["n"] < 1000
    assert content(tmp_path / "a") == content(tmp_path / "b")
    said = refused(capsys, src, tmp_path / "c", "--text-column", "body")
    assert "has no text column 'body', but 'text', 'n'; choose one with --text-column" in said


def test_a_dataset_that_cannot_be_opened(tmp_path, capsys):
    said = refused(capsys, "owner/name", tmp_path / "out")
    assert "owner/name: no such file or folder, and the dataset could not be opened" in said


# --- real files ---


def test_real_files_with_gpt2s_tokenizer(shared_data, shared_corpus, tmp_path):
    names = (
        "debian_policy_devref/debian_policy_devref-000.jsonl.xz",
        "fineweb_edu_sample/fineweb_sample.txt",
    )
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(shared_corpus / name, tmp_path / "in")
    bpe = shared_data / "gpt2_bpe"
    assert run(tmp_path / "in", tmp_path / "out", "--tokenizer", "gpt2", "--bpe-dir", bpe) == 0
    decode = get_tokenizer("gpt2", bpe)._encoding.decode
    found = [d for s in SPLITS for d in read_documents(tmp_path / "out", s, 50256, decode)]
    with lzma.open(tmp_path / "in" / Path(names[0]).name, "rt", encoding="utf-8") as lines:
        expected = [json.loads(line)["text"] for line in lines]
    expected.append((tmp_path / "in" / Path(names[1]).name).read_bytes().decode())
    assert Counter(found) == Counter(expected)


# --- bad input: one line, exit code 2 ---


def test_a_single_document_is_cut_where_training_holds_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one text of some words " * 400)
    assert run(tmp_path / "a.txt", tmp_path / "out") == 0
    assert "validation  no documents; training holds out" in capsys.readouterr().out
    (train,), (val,) = open_folder(tmp_path / "out").held_out(0.1)
    assert len(val.tokens) == pytest.approx(0.1 * len(train.tokens) / 0.9, abs=1)


def test_settings_that_a_source_has_no_use_for(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.jsonl").write_text('{"text": "a text"}\n')
    out = tmp_path / "out"
    assert "has plain text alone" in refused(
        capsys, tmp_path / "a.txt", out, "--text-column", "body"
    )
    assert "holds no plain text to split" in refused(
        capsys, tmp_path / "b.jsonl", out, "--separator", "---"
    )


def test_sources_that_are_not_there(tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such file or folder" in refused(capsys, tmp_path / "nothing.txt", out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"x")
    assert "holds no files to read (.txt" in refused(capsys, tmp_path / "empty", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"good\nna\xefve", "a.txt: not UTF-8 text (byte 0xef at offset 7); convert it"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n',
         "a.jsonl, line 3: not UTF-8 text (byte 0xff at offset 10"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ',
         "a.jsonl, line 2: not valid JSON (Expecting value"),
        ("a.json", b'["a", "b"]',
         "a.json, line 1: not a JSON object; every line must hold one object"),
        ("a.jsonl", b'{"id": 1, "body": "x"}\n',
         "line 1: has no 'text', but 'id', 'body'; choose one with --text-col"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: 'text' is not a string"),
        ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n{"text": null}\n',
         "all of its 3 documents are empty"),
        ("a.txt", b"", "all of its 0 documents are empty; give other text"),
        ("a.txt", "only\n".encode("utf-16"),
         "not UTF-8 text (byte 0xff at offset 0); convert it, for example with iconv -f utf-16 "),
        ("a.jsonl.xz", b"not xz at all", "a.jsonl.xz: cannot be read: damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-20],
         "a.jsonl.xz: cannot be read: damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
         "a.jsonl.gz: cannot be read: damaged or truncated"),
        ("a.jsonl.zst", pa.compress(b'{"text": "a"}\n' * 99, "zstd", asbytes=True)[:-9],
         "a.jsonl.zst: cannot be read"),
        (  # a frame of one block as it is, with a window of 256 MiB
            "a.jsonl.zst",
            b"\x28\xb5\x2f\xfd\x00\x90\x71\x00\x00" + b'{"text": "a"}\n',
            "its zstd window is over 128 MiB; compress it again without --long",
        ),
        ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read as parquet"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON (nested too deeply)"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)  # fmt: skip
def test_files_that_cannot_be_read(name, data, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    assert message in refused(capsys, tmp_path / name, tmp_path / "out", "--val-fraction", "0.0001")


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one<|endoftext|>two", encoding="utf-8-sig")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": "three"}\n', encoding="utf-8-sig")
    fraction = ("--val-fraction", "0.5", "--seed", "3")
    assert run(tmp_path / "in", tmp_path / "out", *fraction) == 0
    found = [d for split in SPLITS for d in read_documents(tmp_path / "out", split)]
    assert sorted(found) == ["one", "three", "two"]


BOMB = """
import sys
from mlx_mla import machine, prepare
code = prepare.main([sys.argv[1], "--out", sys.argv[2], "--tokenizer", "bytes"])
print("peak", machine.peak_memory() >> 20)
sys.exit(code)
"""


def peak_mib(src: Path, out: Path) -> tuple[int, str]:
    """Most MiB that a preparation took, in a process of its own, and what it said on stderr."""
    done = subprocess.run(python("-c", BOMB, str(src), str(out)), capture_output=True, text=True)
    return int(done.stdout.split("peak ")[1]), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_line_of_gigabytes_in_a_small_file_is_refused(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    start, block = b'{"text": "', b"a" * (1 << 20)
    if ending == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            for data in (start, *[block] * 3000):
                file.write(data)
    else:
        with (gzip if ending == ".gz" else lzma).open(path, "wb") as file:
            for data in (start, *[block] * 3000):
                file.write(data)
    assert path.stat().st_size < 20e6
    peak, said = peak_mib(path, tmp_path / "out")
    assert "line 1: longer than 67,108,864 bytes; cut it into documents" in said
    assert peak < 1000


@pytest.mark.slow
def test_large_texts_that_a_small_parquet_file_repeats_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.DictionaryArray.from_arrays(
        pa.array([0, 1] * 20, pa.int32()), ["a" * 40_000_000, "b"]
    )
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    assert path.stat().st_size < 20_000
    peak, said = peak_mib(path, tmp_path / "out")
    assert said == "" or "validation" in said
    assert peak < 2500


def test_a_parquet_file_without_text_lists_its_columns(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    bodies = pa.array([f"text {i % 20}" for i in range(60)]).dictionary_encode()
    pq.write_table(pa.table({"id": range(60), "body": bodies}), path)
    said = refused(capsys, path, tmp_path / "out")
    assert (
        "a.parquet: has no column 'text', but 'id', 'body'; choose one with --text-column" in said
    )
    said = refused(capsys, path, tmp_path / "out", "--text-column", "id")
    assert "column 'id' is int64, not string" in said
    assert run(path, tmp_path / "out", "--text-column", "body") == 0
    assert len([d for s in SPLITS for d in read_documents(tmp_path / "out", s)]) == 60


def test_separators_make_documents_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree\n\n")
    assert (
        run(tmp_path / "a.txt", tmp_path / "out", "--separator", "\n\n", "--val-fraction 0.5") == 0
    )
    assert Counter(d for s in SPLITS for d in read_documents(tmp_path / "out", s)) == Counter(
        ["one", "two", "three"]
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["empty_documents"] == 1


def test_another_preparation_is_never_overwritten(many, prepared, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    before = content(out)
    assert "holds another preparation, with --seed 1337 instead of 3; give --out" in refused(
        capsys, many, out, *SHARDS, "--seed", "3"
    )
    assert "with --shard-tokens 20000 instead of 100000000" in refused(capsys, many, out)
    write_lines(tmp_path / "in" / "a.jsonl", ["x"])
    assert "was prepared from other files" in refused(capsys, tmp_path / "in", out, *SHARDS)
    path = next(out.glob("*train*"))
    path.write_bytes(path.read_bytes()[:-2])
    assert "truncated" in refused(capsys, many, out, *SHARDS)
    assert content(out).keys() == before.keys()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    assert "is not an empty folder" in refused(capsys, many, tmp_path / "notes")
    (tmp_path / "file").write_text("x")
    assert "could not be written" in refused(capsys, many, tmp_path / "file" / "out")


def test_links_to_folders_are_read_once(tmp_path):
    write_lines(tmp_path / "elsewhere" / "a.jsonl", ["one", "two"])
    write_lines(tmp_path / "in" / "b.jsonl", ["three", "four"])
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--val-fraction 0.5") == 0
    found = [d for s in SPLITS for d in read_documents(tmp_path / "out", s)]
    assert sorted(found) == ["four", "one", "three", "two"]


def test_what_is_no_text_is_refused_by_any_name(tmp_path, capsys):
    (tmp_path / "a.tar").write_bytes(b"a" * 100 + b"\0" * 412)
    assert "a.tar: is binary (it has" in refused(capsys, tmp_path / "a.tar", tmp_path / "o")
    (tmp_path / "a.text").write_text("<|endoftext|>".join(map(str, range(20))))
    said = refused(capsys, tmp_path / "a.text", tmp_path / "o", "--revision", "main")
    assert "--revision requires a dataset on the hub" in said
    assert run(tmp_path / "a.text", tmp_path / "out", "--val-fraction 0.5") == 0


def test_impossible_settings(many, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--val-fraction must be between 0 and 1" in refused(
        capsys, many, out, "--val-fraction 0"
    )
    assert "--workers must be at least 1" in refused(capsys, many, out, "--workers", "0")
    assert "--bpe-dir requires" in refused(capsys, many, out, "--bpe-dir", "x")
    assert "--separator must not be empty" in refused(capsys, many, out, "--separator", "")
    assert not out.exists()


@pytest.mark.parametrize(
    "place",
    [{"open": [], "file": 99}, {"open": [[0, [0, 0]], [0, [0, 0]]], "file": 2},
     {"open": [[5, None]], "file": 2}, {"open": [[0, [-1, 0]]], "file": 2},
     {"open": [[0, "x"]], "file": 2}, {"open": [[i, {"rows": 3}] for i in range(8)], "file": 8},
     {"open": {}, "file": 0}, None],
)  # fmt: skip
def test_a_manifest_with_an_impossible_position_is_refused(many, prepared, tmp_path, capsys, place):
    out = tmp_path / "out"
    shutil.copytree(prepared, out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest |= {"complete": False, "parts": [], "next": place}
    (out / "manifest.json").write_text(json.dumps(manifest))
    said = refused(capsys, many, out, *SHARDS)
    assert any(words in said for words in ("manifest.json: next", "the manifest resumes at {"))
