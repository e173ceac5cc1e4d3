"""Token shards: what is accepted, what is refused before training, and that training is the same in
all formats."""

import io
import json
import shutil
import struct

import numpy as np
import pytest
from helpers import TINY, ran, refused, tiny_train, unmeasured, words

from mlx_mla import prepare, train
from mlx_mla.data import shards
from mlx_mla.data.shards import open_folder, open_shard
from mlx_mla.data.windows import TokenWindows
from mlx_mla.errors import UserError

STEPS = words("--steps 6 --log-every 1 --eval-every 3 --save-every 3 --keep 0")


def llmc(tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """llm.c's layout, written by hand."""
    header = struct.pack(
        "<256i", magic, version, len(tokens) if count is None else count, *[0] * 253
    )
    return header + np.asarray(tokens, "<u2").tobytes()


@pytest.fixture(scope="module")
def folders(text_file, tmp_path_factory):
    """The same tokens as `npy` and `llmc` by prepare, and rewritten as nanoGPT's .bin."""
    root = tmp_path_factory.mktemp("shards")
    (root / "text").mkdir()
    for i, part in enumerate(text_file.read_text(encoding="utf-8").split("\n\n")):
        (root / "text" / f"{i:04d}.txt").write_text(part, encoding="utf-8")
    for layout in ("npy", "llmc"):
        argv = words(root / "text", "--out", root / layout, "--tokenizer bytes --format", layout)
        assert prepare.main([*argv, "--val-fraction", "0.2"]) == 0
    (root / "nanogpt").mkdir()
    for split, number in (("train", 1), ("val", 0)):
        tokens = np.load(root / "npy" / f"tokens_{split}_{number:06d}.npy")
        tokens.tofile(root / "nanogpt" / f"{split}.bin")
    return root


def test_all_formats_train_and_resume_alike(folders, tmp_path):
    found = []
    for layout in ("npy", "llmc", "nanogpt"):
        out = tmp_path / layout
        argv = [*TINY, "--data", str(folders / layout), "--out", str(out)]
        assert train.main([*argv, *STEPS]) == 0
        found.append(unmeasured(out))
        # Forget the second half, and train it again.
        shutil.rmtree(out / "checkpoints" / "step-000006")
        (out / "latest").write_text("step-000003\n")
        assert train.main(["--resume", "--out", str(out), *STEPS]) == 0
        found.append(unmeasured(out))
    assert [row["step"] for row in found[0]] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert all(rows == found[0] for rows in found)


def test_resuming_sees_other_data_even_of_the_same_size(folders, tmp_path, capsys):
    for layout in ("npy", "nanogpt"):
        data, out = tmp_path / f"{layout}-data", tmp_path / layout
        shutil.copytree(folders / layout, data)
        tiny_train(out, "--data", data, "--steps", "1")
        if layout == "npy":  # overwritten in place
            first = min(data.glob("*train*"))
            tokens = first.read_bytes()
            first.write_bytes(tokens[:-2] + b"\x01\x00")
            again = ("--resume", "--out", out, "--steps", "2")
            assert "is not the text that" in refused(capsys, *again)
            first.write_bytes(tokens)
            manifest = json.loads((data / "manifest.json").read_text())
            manifest["shards"][0]["sha256"] = "0" * 64
            (data / "manifest.json").write_text(json.dumps(manifest))
        else:
            content = bytearray((data / "train.bin").read_bytes())
            content[2] ^= 1
            (data / "train.bin").write_bytes(content)
        assert "is not the text that" in refused(capsys, "--resume", "--out", out, "--steps", "2")
        # The same data at another place are the same data.
        moved = ("--resume", "--out", str(out), "--steps", "2", "--data", str(folders / layout))
        assert train.main(moved) == 0


def test_without_validation_shards_the_end_is_held_out(tmp_path):
    for i, n in enumerate((500, 300, 40)):
        np.save(tmp_path / f"a_train_{i}.npy", np.arange(i * 1000, i * 1000 + n).astype(np.uint16))
    folder = open_folder(tmp_path)
    train, val = folder.held_out(0.25)
    parts = [[(s.path.name, s.first, len(s.tokens)) for s in part] for part in (train, val)]
    assert parts == [
        [("a_train_0.npy", 0, 500), ("a_train_1.npy", 0, 130)],
        [("a_train_1.npy", 130, 170), ("a_train_2.npy", 0, 40)],
    ]
    assert val[0].tokens[0] == 1130


def test_words_in_names_decide_the_part(tmp_path):
    train = ("edufineweb_train_000001", "evaluation_train_1")
    for name in (*train, "fineweb-val-0", "TinyStories_val"):
        np.save(tmp_path / f"{name}.npy", np.zeros(9, np.uint16))
    folder = open_folder(tmp_path)
    assert [s.path.stem for s in folder.val] == ["TinyStories_val", "fineweb-val-0"]
    np.save(tmp_path / "test_1.npy", np.zeros(9, np.uint16))
    with pytest.raises(UserError, match=r"test_1.npy: the name must contain 'train' or 'val'"):
        open_folder(tmp_path)


TOKENS = np.arange(1000, dtype=np.uint16)


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a_train_1.npy", npy(TOKENS)[:-3],
         r"truncated: 1,000 tokens need 2,128 bytes, it has 2,125"),
        ("a_train_1.npy", npy(TOKENS) + b"\0\0", "longer than its header says"),
        ("a_train_1.npy", npy(TOKENS.astype(np.int32)),
         "holds int32, but token shards hold uint16 or uint32; convert it"),
        ("a_train_1.npy", npy(TOKENS.astype(">u2")), "holds >u2, but token shards hold uint16"),
        ("a_train_1.npy", npy(TOKENS.reshape(10, 100)),
         "has 2 dimensions, but token shards have one"),
        ("a_train_1.npy", npy(np.array([{}], object)), "holds object, but token shards"),
        ("a_train_1.npy", b"\x93NUMPY\x01\x00\x10", "not a NumPy array file"),
        ("a_train_1.npy", b"", "not a NumPy array file"),
        ("a_train_1.npy", npy(TOKENS).replace(b"}", b"("), "not a NumPy array file"),
        ("a_train_1.npy", npy(TOKENS[:0]), "holds no tokens"),
        ("a_train_000001.bin", llmc(TOKENS)[:-2],
         r"truncated: 1,000 tokens need 3,024 bytes, it has 3,022"),
        ("a_train_000001.bin", llmc(TOKENS, count=999), "longer than its header says"),
        ("a_train_000001.bin", llmc(TOKENS, magic=1),
         "does not begin with llm.c's magic number 20240520, and only nanoGPT's"),
        ("a_train_000001.bin", llmc(TOKENS, version=2), "llm.c version 2 and 1000 tokens"),
        ("train.bin", TOKENS.astype("<i4").tobytes(), "every second 16-bit word is zero"),
        ("train.bin", TOKENS.astype("<u4").tobytes(), "so the token ids have 32 or 64 bits"),
        ("my_train.bin", TOKENS.astype("<i8").tobytes(), "every second 16-bit word"),
        ("train.bin", TOKENS.astype(">u4").tobytes(), "every second 16-bit word is zero"),
        ("train.bin", TOKENS.tobytes()[:-1],
         "truncated: 1,999 bytes are not a whole number of uint16 tokens"),
    ],
)  # fmt: skip
def test_shards_that_are_not_what_they_should_be_are_named(name, data, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(data)
    said = refused(capsys, *TINY, "--data", tmp_path, "--out", tmp_path / "run")
    assert f"{tmp_path / name}: " in said
    with pytest.raises(UserError, match=message):
        open_shard(tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_trained_on(folders, tmp_path, capsys, shared_data):
    def no(data, *flags):
        return refused(capsys, *TINY, "--out", tmp_path / "run", "--data", tmp_path / data, *flags)

    (tmp_path / "data").mkdir()
    assert "holds no token shards" in no("data")
    np.save(tmp_path / "data" / "a_val_0.npy", TOKENS)
    assert "holds no training shards" in no("data")
    np.save(tmp_path / "data" / "a_train_1.npy", TOKENS[:10])
    assert "has 10 tokens in a shard, fewer than one context" in no("data", "--vocab-size 1000")
    gpt2 = ("--tokenizer", "gpt2", "--bpe-dir", shared_data / "gpt2_bpe")
    mismatch = "was prepared with --tokenizer bytes, but training has --tokenizer gpt2"
    assert f"{mismatch}; give --tokenizer bytes" in no(folders / "npy", *gpt2)
    shutil.copytree(folders / "npy", tmp_path / "broken")
    manifest = tmp_path / "broken" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "complete": False}))
    assert "the preparation is not finished; run mlx_mla.prepare again" in no("broken")
    values["shards"][1]["tokens"] += 1
    manifest.write_text(json.dumps(values))
    assert "manifest.json says" in no("broken")
    manifest.write_text("{")
    assert "manifest.json: not valid JSON" in no("broken")
    assert not (tmp_path / "run").exists()


def test_ids_over_the_vocabulary_are_found_before_training_or_as_they_are_read(tmp_path):
    tokens = np.zeros(10**6, np.uint16)
    tokens[-1] = 300
    np.save(tmp_path / "a_train_1.npy", tokens)
    shard = open_shard(tmp_path / "a_train_1.npy")
    with pytest.raises(
        UserError, match=r"a_train_1.npy has token id 300 at token 999,999, outside"
    ):
        TokenWindows([shard], 16, 0, 257)
    tokens[-1], tokens[3000] = 0, 300  # between the samples
    np.save(tmp_path / "a_train_1.npy", tokens)
    windows = TokenWindows([open_shard(tmp_path / "a_train_1.npy")], 16, 0, 257)
    with pytest.raises(UserError, match=r"a_train_1.npy has token id 300 at token 3,000, outside"):
        windows.rows(0, windows.windows_per_epoch)


@pytest.mark.parametrize("how", ["removed", "truncated"])
def test_data_that_vanish_while_training_end_it_in_one_line(
    folders, tmp_path, capsys, monkeypatch, how
):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folders / "nanogpt", data)
    real = TokenWindows.rows

    def rows(self, first, count):
        if first // count == 5:
            shutil.rmtree(data) if how == "removed" else (data / "train.bin").write_bytes(b"")
        return real(self, first, count)

    monkeypatch.setattr(TokenWindows, "rows", rows)
    said = refused(capsys, *TINY, "--data", data, "--out", out, *STEPS)
    assert (
        "train.bin: the data " + ("can no longer be read" if how == "removed" else "changed while")
        in said
    )
    assert f"the newest good checkpoint is {out / 'checkpoints' / 'step-000003'}" in said


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a_train_1.npy"
    pieces = iter([TOKENS, None])  # the second cannot be written
    with pytest.raises(TypeError):
        shards.write_shard(path, "npy", pieces, 2000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("shards", 0, "file"), "../elsewhere/a_train_1.npy", "shards[0].file must be the name of"),
        (("shards", 0, "file"), "/etc/passwd", "shards[0].file must be the name of a file in the"),
        (("shards", 0, "file"), "\0", "shards[0].file must be the name of a file in the same"),
        (("shards", 0, "split"), "test", "shards[0].split = 'test' is not one of"),
        (("shards", 0, "tokens"), -1, "shards[0].tokens must not be negative, not -1"),
        (("shards", 0, "tokens"), "9", "shards[0].tokens = '9' is not a value of type int"),
        (("shards", 0, "tokens"), 10**400, "shards[0].tokens must be a number of at most 64 bits"),
        (("shards", 1, "sha256"), "x", "shards[1].sha256 must be a sha256, not 'x'"),
        (("shards",), {}, "shards = {} is not a value of type list"),
        (("tokenizer",), "bytes", "tokenizer = 'bytes' is not a table of names and values"),
        (("tokenizer", "name"), ["x"], "tokenizer.name = ['x'] is not a value of type str"),
        (("complete",), 1, "complete = 1 is not a value of type bool"),
        (("sources",), [1], "sources[0] = 1 is not a value of type list of 2 items"),
    ],
)
def test_a_manifest_that_prepare_did_not_write_is_refused(
    folders, tmp_path, capsys, place, value, problem
):
    data = tmp_path / "data"
    shutil.copytree(folders / "npy", data)
    manifest = json.loads((data / "manifest.json").read_text())
    *parents, last = place
    node = manifest
    for key in parents:
        node = node[key]
    node[last] = value
    (data / "manifest.json").write_text(json.dumps(manifest))
    said = refused(capsys, *TINY, "--data", data, "--out", tmp_path / "run")
    assert f"manifest.json: {problem}" in said
    assert said.endswith("; remove it and prepare the data again\n")


SHARDS = 300
OPEN_ALL = """
import resource, sys
from pathlib import Path
import mlx_mla.backends.mlx
from mlx_mla.data.shards import open_folder
resource.setrlimit(resource.RLIMIT_NOFILE, (256, int(sys.argv[2])))
try:
    print(len(open_folder(Path(sys.argv[1])).train))
except ValueError as e:
    print(e)
"""


@pytest.mark.parametrize(
    ("hard", "answer"),
    [
        (4096, f"{SHARDS}"),
        (300, "300 shards, but this process may open only 256 files; raise"),
    ],
)
def test_more_shards_than_the_limit_of_open_files(tmp_path, hard, answer):
    for i in range(SHARDS):
        np.save(tmp_path / f"a_train_{i:03d}.npy", TOKENS[:100])
    assert answer in ran("-c", OPEN_ALL, tmp_path, hard).stdout


def test_small_uint16_files_are_read_as_they_are(tmp_path):
    for tokens in ([5, 0] * 7, [0] * 100, [1] * 100, list(range(100))):
        (tmp_path / "train.bin").write_bytes(np.array(tokens, "<u2").tobytes())
        assert open_shard(tmp_path / "train.bin").tokens.tolist() == tokens


def test_checkpoints_of_versions_that_kept_no_samples_of_the_data_go_on(folders, tmp_path):
    out = tmp_path / "run"
    argv = [*TINY, "--data", str(folders / "npy"), "--out", str(out)]
    assert train.main([*argv, "--steps", "1"]) == 0
    path = out / "checkpoints" / "step-000001" / "train_state.json"
    (path.parent / "SHA256SUMS").unlink()
    info = json.loads(path.read_text())
    del info["data_samples_sha256"]
    path.write_text(json.dumps(info))
    assert train.main(["--resume", "--out", str(out), "--steps", "2"]) == 0
