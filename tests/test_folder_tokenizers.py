"""--tokenizer FOLDER: any tokenizer.json in training and in prepared shards, in either width."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import TINY, refused
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_mla import checkpoint, prepare, train
from mlx_mla.data.shards import open_folder
from mlx_mla.data.tokenizer import ByteTokenizer, FolderTokenizer, GPT2Tokenizer, get_tokenizer
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import initial_weights

END = "</s>"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "."]


def save_words(folder, size=20, end=END, first="the"):
    """A tokenizer of whole words, its end of text the first of its ids, padded to a size."""
    words = [END, "[UNK]", first, *(w for w in WORDS if w != first)]
    words += [f"w{i}" for i in range(size - len(words))]
    model = models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token=end)
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    stories = ["the cat sat on the mat . " * n + END for n in range(20, 50)]
    path.write_text("<|endoftext|>".join(stories))
    return path


def flags(text, *more):
    short = ("--n-positions", "24", "--steps", "2", "--eval-every", "0", "--sample-tokens", "6")
    return [*map(str, (*TINY, *short, "--data", text, *more))]


def test_ids_are_the_tokenizers_and_no_text_spells_the_end(tmp_path):
    tokenizer = get_tokenizer(str(save_words(tmp_path / "words")))
    assert (tokenizer.size, tokenizer.end_of_text) == (20, 0)
    assert tokenizer.encode("the cat </s> mat").tolist() == [2, 3, 1, 1, 1, 7]
    assert tokenizer.encode("a").dtype == np.uint16
    wide = get_tokenizer(str(save_words(tmp_path / "wide", 2**16 + 1)))
    assert wide.encode(f"a w{2**16 + 1 - 10}").dtype == np.uint32


@pytest.mark.parametrize(
    ("size", "dtype", "layout"),
    [
        (20, np.uint16, "npy"),
        (70_000, np.uint32, "llmc"),
        pytest.param(20, np.uint16, "llmc", marks=pytest.mark.slow),
        pytest.param(70_000, np.uint32, "npy", marks=pytest.mark.slow),
    ],
)
def test_shards_are_as_wide_as_the_tokenizer_asks(tmp_path, text, size, dtype, layout):
    words = save_words(tmp_path / "words", size)
    last = f"w{size - 10}"
    text.write_text(text.read_text().replace("mat", last))
    out = tmp_path / "shards"
    argv = [str(text), "--out", str(out), "--tokenizer", str(words), "--format", layout]
    argv += ["--val-fraction", "0.3"]
    assert prepare.main(argv) == 0
    assert prepare.main(argv) == 0  # done already
    shard = open_folder(out).train[0]
    assert shard.tokens.dtype == dtype
    assert shard.tokens[0] == 0
    assert shard.tokens.max() == FolderTokenizer(str(words)).encode(last)[0] == size - 1
    assert train.main(flags(out, "--tokenizer", words, "--out", tmp_path / "run")) == 0
    assert checkpoint.ModelFolder(checkpoint.latest(tmp_path / "run")).config.vocab_size == size


def test_a_model_of_its_own_tokenizer_is_trained_resumed_and_started_from(tmp_path, text):
    words = save_words(tmp_path / "words")
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert train.main(flags(text, "--tokenizer", words, "--out", first)) == 0
    folder = checkpoint.latest(first)
    assert checkpoint.ModelFolder(folder).config.vocab_size == 20
    assert FolderTokenizer(str(folder)).identity == FolderTokenizer(str(words)).identity
    assert train.main(["--resume", "--steps", "4", "--out", str(first)]) == 0
    sample = json.loads((first / "samples.jsonl").read_text().splitlines()[-1])
    assert len(sample["text"].split()) > 1
    # Neither names a tokenizer, and nano's is bytes.
    init = ["--data", str(text), "--init", str(first), "--steps", "1", "--no-compile"]
    assert train.main([*init, "--out", str(second)]) == 0
    assert train.main(flags(text, "--teacher", first, "--out", third)) == 0
    for run in (second, third):
        assert FolderTokenizer(str(checkpoint.latest(run))).size == 20


def test_the_default_of_init_needs_no_download(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlx_mla.data.tokenizer._gpt2_encoding", lambda _: pytest.fail("GPT-2's was asked for")
    )
    words, folder = save_words(tmp_path / "words"), tmp_path / "model"
    config = ModelConfig(n_layer=1, n_embd=16, n_head=2, n_positions=2048, vocab_size=20).resolved()
    folder.mkdir()
    tokenizer = FolderTokenizer(str(words)).fast_tokenizer()
    checkpoint.write_model(folder, config, initial_weights(config, 0), tokenizer, "")
    run = train.configure({"init": str(folder), "preset": "gpt2-124m"})
    assert run.tokenizer == str(folder)
    asked = train.configure({"init": str(folder), "tokenizer": "bytes"})
    assert asked.tokenizer == "bytes"


def test_what_does_not_fit_is_refused(tmp_path, text, capsys):
    words, out = save_words(tmp_path / "words"), tmp_path / "run"
    others = save_words(tmp_path / "others", first="cat")
    none = tmp_path / "none"

    def line(*more):
        said = refused(capsys, *flags(text, *more, "--out", out))
        assert not out.exists()
        return said

    assert "none: no folder with tokenizer.json; give one" in line("--tokenizer", none)
    endless = save_words(tmp_path / "endless", end=None)
    assert "has no end-of-text token" in line("--tokenizer", endless)
    (none / "x").mkdir(parents=True)
    (none / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in line("--tokenizer", none)
    few = line("--tokenizer", words, "--vocab-size", "10")
    assert "--vocab-size 10 is smaller than the tokenizer's 20 ids" in few
    assert train.main(flags(text, "--tokenizer", words, "--out", tmp_path / "first")) == 0
    for option in ("--teacher", "--init"):
        argv = ["--data", text, option, tmp_path / "first", "--tokenizer", others, "--out", out]
        said = refused(capsys, *map(str, argv))
        assert "its tokenizer has 20 ids" in said and "leave --tokenizer out" in said
    shards = tmp_path / "shards"
    argv = [str(text), "--out", str(shards), "--tokenizer", str(words), "--val-fraction", "0.3"]
    assert prepare.main(argv) == 0
    said = refused(capsys, *flags(shards, "--tokenizer", others, "--out", out))
    assert f"was prepared with --tokenizer {words}" in said
    shutil.copy(others / "tokenizer.json", words / "tokenizer.json")
    assert "was prepared with another tokenizer of the name" in refused(
        capsys, *argv, command=prepare.main
    )


def test_a_copy_of_a_named_tokenizer_is_that_tokenizer(tmp_path):
    """So shards that were prepared with its name serve a model that carries it."""
    ByteTokenizer().fast_tokenizer().save_pretrained(str(tmp_path / "bytes"))
    copy = FolderTokenizer(str(tmp_path / "bytes"))
    assert copy.identity == ByteTokenizer.identity
    sample = "naïve 東京 <|endoftext|>\n"
    assert copy.encode(sample).tolist() == ByteTokenizer().encode(sample).tolist()


def test_gpt2s_vocabulary_with_another_normalizer_is_another_tokenizer(shared_data, tmp_path):
    gpt2 = GPT2Tokenizer(shared_data / "gpt2_bpe")
    for name, normalizer in (("same", None), ("lower", normalizers.Lowercase())):
        fast = gpt2.fast_tokenizer()
        if normalizer is not None:
            fast.backend_tokenizer.normalizer = normalizer
        fast.save_pretrained(str(tmp_path / name))
        same = FolderTokenizer(str(tmp_path / name)).identity == gpt2.identity
        assert same == (name == "same")


def test_a_tokenizer_that_drops_characters_is_refused(tmp_path):
    own = Tokenizer(models.BPE({"a": 0, END: 1}, []))
    fast = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=END)
    fast.save_pretrained(str(tmp_path / "own"))
    with pytest.raises(UserError, match="drops characters that it has no token for"):
        FolderTokenizer(str(tmp_path / "own"))


def test_errors_are_seen_after_threads_have_encoded(tmp_path):
    tokenizer, before = get_tokenizer(str(save_words(tmp_path / "words"))), os.fstat(2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tokenizer.encode, ["the cat sat " * 200] * 400))
    assert os.fstat(2) == before


def test_bytes_in_another_order_are_another_tokenizer(tmp_path, tiny_run, text_file, capsys):
    """GPT-2's order of bytes: "A" is 32, and the end of text is the last id, as in ours."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>")
    fast.save_pretrained(str(tmp_path / "own"))
    found = FolderTokenizer(str(tmp_path / "own"))
    assert found.size == ByteTokenizer().size and found.identity != ByteTokenizer().identity
    argv = ("--init", tiny_run, "--tokenizer", tmp_path / "own", "--data", text_file)
    assert "leave --tokenizer out" in refused(capsys, *argv, "--out", tmp_path / "run")
