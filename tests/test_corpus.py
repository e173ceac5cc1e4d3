"""Reading training text."""

import numpy as np
import pytest

from mlx_mla.data.corpus import fingerprint, read_documents, tokenize
from mlx_mla.data.tokenizer import ByteEncoder
from mlx_mla.errors import UserError


def test_builtin_text_is_there_and_english():
    documents = read_documents("builtin")
    assert sum(map(len, documents)) > 300_000
    assert sum(d.count(" the ") for d in documents) > 1000


def test_every_document_begins_with_end_of_text():
    tokens = tokenize(["ab", "c"], ByteEncoder())
    assert tokens.tolist() == [256, 97, 98, 256, 99]
    assert tokens.dtype == np.uint16
    assert fingerprint(tokens) == fingerprint(tokens.astype(np.int64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; --data takes"),
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


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        read_documents(str(tmp_path))
