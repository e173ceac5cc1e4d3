"""Training text: a file, or the prose that comes with Python."""

import hashlib
from pathlib import Path

import numpy as np

from mlx_mla.data.tokenizer import TextEncoder
from mlx_mla.errors import UserError

BUILTIN = "builtin"


def read_documents(source: str) -> list[str]:
    """Read training text.

    Args:
        source: A UTF-8 text file, which is one document; or "builtin": the language reference that
            CPython carries for `help()`, one document a topic, about 465 KB in all.

    Raises:
        UserError: If there is no such file, or it is empty or not UTF-8.
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
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --data takes text, shards or {BUILTIN!r}") from None
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}: not UTF-8 text (byte {e.object[e.start]:#04x} at offset {e.start}); "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; --data needs text to train on")
    return [text]


def tokenize(documents: list[str], encoder: TextEncoder) -> np.ndarray:
    """Token ids of all documents, each after an `<|endoftext|>`: uint16 of shape (tokens,)."""
    parts = []
    for document in documents:
        parts += [np.array([encoder.end_of_text], np.uint16), encoder.encode(document)]
    return np.concatenate(parts)


def fingerprint(tokens: np.ndarray) -> str:
    """sha256 of the token ids, which tells whether a resumed run sees the same data."""
    return hashlib.sha256(tokens.astype("<u2", copy=False).tobytes()).hexdigest()
