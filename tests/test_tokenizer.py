"""Both tokenizers: the ids of tokenizer.json are those used in training, on any text."""

import json
import re

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_mla.data.tokenizer import ByteTokenizer, GPT2Tokenizer, get_tokenizer
from mlx_mla.errors import UserError

TEXTS = [
    "Hello, world!", "  leading and trailing   ", "don't we'll I'VE it's",
    "日本語のテキスト、中文文本和한국어",
    "Привет, мир — «да»", "مرحبا بالعالم שלום", "हिन्दी में लिखा",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff", "tabs\tand\r\nnew\n\n\nlines  \n ",
    "1234567890 3.14159 1e-5", "\x00\x01\x7f control", "a" * 200, "",
]  # fmt: skip

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return GPT2Tokenizer(shared_data / "gpt2_bpe")


@pytest.fixture(scope="module")
def gpt2_fast(gpt2, tmp_path_factory):
    """The tokenizer as a model folder's reader gets it."""
    folder = tmp_path_factory.mktemp("gpt2")
    gpt2.fast_tokenizer().save_pretrained(str(folder))
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


@given(text=any_text)
def test_bytes_are_the_utf8_bytes(text):
    tokenizer, fast = ByteTokenizer(), BYTES_FAST
    ids = list(text.encode())
    assert tokenizer.encode(text).tolist() == ids
    assert fast.encode(text, add_special_tokens=False) == ids
    assert fast.decode(ids) == text


BYTES_FAST = ByteTokenizer().fast_tokenizer()


def test_end_of_text_ids(gpt2_fast):
    assert (len(BYTES_FAST), BYTES_FAST.eos_token_id, BYTES_FAST.bos_token_id) == (257, 256, 256)
    assert (len(gpt2_fast), gpt2_fast.eos_token_id) == (50257, 50256)


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_ids_agree_on_many_scripts(gpt2, gpt2_fast, text):
    ids = gpt2.encode(text).tolist()
    assert gpt2_fast.encode(text, add_special_tokens=False) == ids
    assert gpt2_fast.decode(ids) == text


def test_gpt2_ids_agree_on_any_text(gpt2, gpt2_fast):
    @given(text=any_text)
    @settings(max_examples=150)
    def check(text):
        assert gpt2_fast.encode(text, add_special_tokens=False) == gpt2.encode(text).tolist()

    check()


def test_gpt2_ids_agree_on_real_files(gpt2, gpt2_fast, shared_data):
    for name in ("corpus/tinyshakespeare/input.txt", "wikitext2/wiki.test.raw"):
        text = (shared_data / name).read_text(encoding="utf-8")[:200_000]
        ids = gpt2.encode(text).tolist()
        assert gpt2_fast.encode(text, add_special_tokens=False) == ids
        assert gpt2_fast.decode(ids) == text


def test_gpt2_ids_are_tiktokens_own(gpt2, shared_data, monkeypatch, tmp_path):
    # tiktoken's own definition of "gpt2", fed from the same files through its cache folder.
    import hashlib

    from tiktoken_ext import openai_public

    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):
        key = hashlib.sha1((base + name).encode()).hexdigest()
        (tmp_path / key).write_bytes((shared_data / "gpt2_bpe" / name).read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = tiktoken.Encoding(**openai_public.gpt2())
    for text in TEXTS:
        assert gpt2.encode(text).tolist() == theirs.encode_ordinary(text)


def test_spelling_end_of_text_does_not_end_training_text(gpt2):
    for tokenizer in (ByteTokenizer(), gpt2):
        ids = tokenizer.encode("a<|endoftext|>b").tolist()
        assert tokenizer.end_of_text not in ids


def test_missing_and_changed_vocabulary_files_are_named(tmp_path, shared_data):
    with pytest.raises(UserError, match=r"encoder.json: no such file; --bpe-dir needs"):
        get_tokenizer("gpt2", tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes((shared_data / "gpt2_bpe" / name).read_bytes())
    values = json.loads((tmp_path / "encoder.json").read_text())
    values["!"], values['"'] = values['"'], values["!"]
    (tmp_path / "encoder.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="not GPT-2's file"):
        get_tokenizer("gpt2", tmp_path)


def test_no_network_and_no_files_says_what_to_give(monkeypatch, tmp_path):
    from mlx_mla.data import tokenizer

    def refuse(_):
        raise ConnectionError("no network")

    tokenizer._gpt2_encoding.cache_clear()
    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="give --bpe-dir a folder"):
        get_tokenizer("gpt2")


class Impatient:
    """tiktoken with a lower limit on white space."""

    def __init__(self, encoding):
        self.encoding = encoding

    def encode_to_numpy(self, text, **options):
        if any(len(r[0]) > 1500 and r.end() < len(text) for r in re.finditer(r"\s+", text)):
            raise ValueError("backtracking")
        return self.encoding.encode_to_numpy(text, **options)


def test_long_white_space_encodes_as_if_tiktoken_had_no_limit(shared_data):
    tokenizer = GPT2Tokenizer(shared_data / "gpt2_bpe")
    encoding = tokenizer._encoding
    tokenizer._encoding = Impatient(encoding)
    for space in (" ", "\n", " \n\t", "\u3000"):
        for after in ("x", "é", ".. ", "\x1cx", "9", "'s"):
            text = "a" + space * 1600 + after + "b" + space * 3000 + after + space * 1600
            assert tokenizer.encode(text).tolist() == encoding.encode_ordinary(text)
    tokenizer._encoding = encoding
    text = "a" + " " * 1_000_000 + "x"
    with pytest.raises(ValueError, match="backtracking"):
        encoding.encode_to_numpy(text)
    assert encoding.decode(tokenizer.encode(text).tolist()) == text
