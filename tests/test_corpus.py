"""Reading training text."""

import gzip
import lzma
import struct

import numpy as np
import pytest

from mlx_mla.data.corpus import fingerprint, read_documents, tokenize
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.errors import UserError


def test_builtin_text_is_there_and_english():
    documents = read_documents("builtin")
    assert sum(map(len, documents)) > 300_000
    assert sum(d.count(" the ") for d in documents) > 1000


def test_every_document_begins_with_end_of_text():
    tokens = tokenize(["ab", "c"], ByteTokenizer())
    assert tokens.tolist() == [256, 97, 98, 256, 99]
    assert tokens.dtype == np.uint16
    assert fingerprint(tokens) == fingerprint(tokens.astype(np.int64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; --data accepts"),
        (b"", "the file is empty"),
        (b" \n ", "the file is empty"),
        (b"caf\xe9 au lait", "not UTF-8 text .byte 0xe9 at offset 3.; convert it"),
    ],
)
def test_unreadable_text_is_refused(content, message, tmp_path):
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n', "is JSON lines, not text; turn it into token shards with"),
        ("a.json", b"{}", "is JSON lines, not text"),
        ("a.txt.gz", gzip.compress(b"text"),
         "is compressed, not text; .*python -m mlx_mla.prepare"),
        ("a", gzip.compress(b"text"), "is compressed, not text"),
        ("a.txt.xz", lzma.compress(b"text"), "is compressed, not text"),
        ("a.txt.zst", b"", "is compressed, not text"),
        ("a.parquet", b"PAR1", "is a parquet file, not text"),
        ("train.bin", np.arange(99, dtype="<u2").tobytes(),
         "is a token shard, not text; give --data its folder"),
        ("a", struct.pack("<3i", 20240520, 1, 0), "is a token shard"),
        ("a", struct.pack("<3i", 20240801, 7, 0), "is a token shard"),
        ("tokens.npy", b"\x93NUMPY", "is a token shard"),
        ("a.dat", np.arange(99, dtype="<u2").tobytes(), r"is binary \(it has NUL characters\)"),
    ],
)  # fmt: skip
def test_files_that_are_no_text_are_named_with_what_reads_them(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(str(path))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("Ænima", encoding="utf-8-sig")
    assert read_documents(str(tmp_path / "a.txt")) == ["Ænima"]


def test_devices_are_refused():
    with pytest.raises(UserError, match="is a device"):
        read_documents("/dev/zero")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_documents(str(tmp_path))
