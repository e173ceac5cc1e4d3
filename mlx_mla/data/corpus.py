"""Training text: a file, or the documentation built into Python."""

import hashlib
import shlex
import struct
from pathlib import Path

import numpy as np

from mlx_mla.data.shards import LLMC_VERSIONS, SUFFIXES
from mlx_mla.data.tokenizer import Tokenizer, id_type
from mlx_mla.errors import UserError
from mlx_mla.files import decoded

BUILTIN = "builtin"

TEXT, JSON_LINES, PARQUET = (".txt", ".text"), (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSED = (".gz", ".xz", ".zst")
"""Suffixes of the files that `mlx_mla.prepare` reads."""

_FORMATS = (
    ("JSON lines", JSON_LINES, ()),
    ("a parquet file", PARQUET, (b"PAR1",)),
    ("compressed", COMPRESSED, (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")),
)
"""Formats other than plain text, recognized by suffix or first bytes."""
SHARD, BINARY = "a token shard", "binary (it has NUL characters)"
_SHARDS = (b"\x93NUMPY", *(struct.pack("<i", magic) for magic, _ in LLMC_VERSIONS))


def read_documents(source: str) -> list[str]:
    """Read training text.

    Args:
        source: A UTF-8 text file, which is read as one document; or "builtin": the language
            reference that CPython includes for `help()`, one document per topic, about 465 KB in
            total.

    Raises:
        UserError: If the file does not exist, is empty, is not UTF-8, or has a format that
            `mlx_mla.prepare` reads.
    """
    if source == BUILTIN:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise UserError("this Python lacks pydoc_data; give --data a text file") from None
        return [text for _, text in sorted(topics.items())]
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a UTF-8 text file is needed here")
    if path.is_char_device() or path.is_block_device():
        raise UserError(f"{path}: is a device; a UTF-8 text file is needed here")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; --data accepts text, shards or {BUILTIN!r}"
        ) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if kind := other_than_text(path, data):
        remedy = f"give --data {'its folder' if kind == SHARD else 'a text, or a folder of shards'}"
        if kind not in (SHARD, BINARY):
            remedy = (
                f"turn it into token shards with python -m mlx_mla.prepare {shlex.quote(str(path))}"
                " --out DIR, and give --data DIR"
            )
        raise UserError(f"{path}: is {kind}, not text; {remedy}")
    text = decoded(data, str(path))
    if not text.strip():
        raise UserError(f"{path}: the file is empty; --data needs text to train on")
    return [text]


def other_than_text(path: Path, data: bytes) -> str | None:
    """Say what a file is by its name and its first bytes, if not text; None for text."""
    for name, suffixes, starts in _FORMATS:
        if path.suffix.lower() in suffixes or data.startswith(starts):
            return name
    if path.suffix in SUFFIXES.values() or data.startswith(_SHARDS):
        return SHARD
    return BINARY if b"\0" in data else None


def tokenize(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """Tokenize documents, with an end-of-text token before each.

    Returns:
        Token ids, `id_type(tokenizer.size)` of shape (tokens,).
    """
    start = np.array([tokenizer.end_of_text], id_type(tokenizer.size))
    return np.concatenate([part for text in documents for part in (start, tokenizer.encode(text))])


def fingerprint(tokens: np.ndarray) -> str:
    """sha256 of the token ids, which shows whether a resumed run sees the same data."""
    little = "<u2" if not len(tokens) or int(tokens.max()) < 2**16 else "<u4"
    return hashlib.sha256(tokens.astype(little, copy=False).tobytes()).hexdigest()
