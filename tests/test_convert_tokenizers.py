"""The tokenizer of a converted model is the source's, as transformers' AutoTokenizer reads it."""

import json
import pickle
import shutil

import pytest

torch = pytest.importorskip("torch")

import foreign
from helpers import converted, edit
from helpers import refused as refusal
from transformers import AutoTokenizer, GPT2LMHeadModel

from convert import __main__ as convert
from mlx_mla import checkpoint, generate, train
from mlx_mla.data.tokenizer import ByteTokenizer, GPT2Tokenizer

TEXT = "It's  1984,\n\nthe naïve 東京 <|endoftext|>x<|user|> y<|pad|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
EOT = 256 + len(MERGES)
SIZE = EOT + 1
ADDED = {"pad_token": "<|pad|>", "additional_special_tokens": ["<|user|>"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small tokenizer in the five files of openai-community/gpt2, whose tokenizer_config.json
    says one thing."""
    folder = tmp_path_factory.mktemp("files")
    ByteTokenizer().fast_tokenizer().save_pretrained(str(folder))
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    vocab = values["model"]["vocab"] | {a + b: 256 + i for i, (a, b) in enumerate(MERGES)}
    values["model"].update(vocab=vocab, merges=MERGES)
    values["added_tokens"][0]["id"] = EOT
    values["pre_tokenizer"]["use_regex"] = True
    path.write_text(json.dumps(values))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (folder / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": EOT}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def source(files, tmp_path):
    """Writes a GPT-2 folder with that tokenizer and changes to it."""

    def make(rows=SIZE, drop=(), **changed):
        folder = tmp_path / "gpt2"
        foreign.gpt2(n_layer=1, n_embd=8, vocab_size=rows).save_pretrained(str(folder))
        edit(folder / "config.json", eos_token_id=EOT, bos_token_id=EOT)
        for path in files.iterdir():
            if path.name not in drop:
                shutil.copy(path, folder / path.name)
        for stem, values in changed.items():
            (folder / f"{stem}.json").write_text(json.dumps(values))
        return folder

    return make


def same_tokenizer(out, src):
    """What the referee reads from the source, our readers and others read from the folder."""
    theirs = AutoTokenizer.from_pretrained(str(src))
    for ours in (checkpoint.ModelFolder(out).tokenizer, AutoTokenizer.from_pretrained(
        str(out), trust_remote_code=True
    )):  # fmt: skip
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert set(ours.all_special_ids) == set(theirs.all_special_ids)
        assert ours.get_vocab() == theirs.get_vocab()
        assert ours.encode(TEXT) == theirs.encode(TEXT)
        ids = ours.encode(TEXT)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize(
    ("rows", "drop", "changed"),
    [
        (SIZE, (), {}),  # as openai-community/gpt2 is
        (SIZE, ("tokenizer_config.json",), {}),
        (SIZE, ("tokenizer.json",), {}),
        (SIZE, ("tokenizer.json", "tokenizer_config.json"), {}),
        (SIZE + 47, (), {}),
        (SIZE + 2, (), {"tokenizer_config": ADDED}),
        (SIZE + 47, (), {"tokenizer_config": ADDED}),
        (SIZE, (), {"tokenizer_config": {"add_prefix_space": True}}),
        (SIZE, (), {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}),
        (SIZE, (), {"tokenizer_config": {"pad_token": "<|endoftext|>"}}),
        (SIZE + 2, ("tokenizer.json", "tokenizer_config.json"),
         {"added_tokens": {"<|pad|>": SIZE, "<|user|>": SIZE + 1}, "special_tokens_map": ADDED}),
    ],
)  # fmt: skip
def test_special_tokens_are_those_that_transformers_sees(rows, drop, changed, source, tmp_path):
    src = source(rows, drop, **changed)
    out = converted(src, tmp_path / "out")
    same_tokenizer(out, src)
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == EOT
    assert config.get("tokenizer_size") == (None if rows < SIZE + 47 else len(
        AutoTokenizer.from_pretrained(str(src))
    ))  # fmt: skip


def test_gpt2_itself(shared_data, tmp_path):
    """The published files, and the same folder as transformers reads it."""
    src = tmp_path / "gpt2"
    foreign.gpt2(n_layer=1, n_embd=8, vocab_size=50257).save_pretrained(str(src))
    GPT2Tokenizer(shared_data / "gpt2_bpe").fast_tokenizer().save_pretrained(str(src))
    (src / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    out = converted(src, tmp_path / "out")
    same_tokenizer(out, src)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 50256


def test_gpt2s_end_of_text_goes_all_the_way(source, tmp_path, capfd):
    ours = converted(source(), tmp_path / "ours")
    back = converted(ours, tmp_path / "back", "--to", "hf")
    model = GPT2LMHeadModel.from_pretrained(str(back))
    assert model.config.eos_token_id == model.generation_config.eos_token_id == EOT
    assert AutoTokenizer.from_pretrained(str(back)).eos_token_id == EOT
    again = converted(back, tmp_path / "again")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (ours / name).read_bytes(), name
    capfd.readouterr()
    argv = ["--model", str(ours), "--prompt", "", "--max-tokens", "3", "--json"]
    assert generate.main(argv) == 0
    assert json.loads(capfd.readouterr().out)["prompt_tokens"] == 1


def test_folders_that_lost_their_end_of_text_find_it_again(source, tmp_path):
    """Folders written from OpenAI's files before the end of text was looked for."""
    old = converted(source(), tmp_path / "old")
    edit(old / "config.json", eos_token_id=None, bos_token_id=None)
    (old / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend", "model_max_length": 48}'
    )
    (old / "SHA256SUMS").unlink()
    assert checkpoint.ModelFolder(old).tokenizer.eos_token_id == EOT
    new = converted(old, tmp_path / "new")
    assert json.loads((new / "config.json").read_text())["eos_token_id"] == EOT


def test_bpe_dir_does_not_replace_a_tokenizer_that_is_there(source, shared_data, tmp_path, capfd):
    src = source(50257 + 2, tokenizer_config=ADDED)
    bpe = shared_data / "gpt2_bpe"
    same_tokenizer(converted(src, tmp_path / "own", "--bpe-dir", bpe), src)
    assert f"{SIZE + 2} tokens" in capfd.readouterr().out
    asked = converted(src, tmp_path / "asked", "--tokenizer", "gpt2", "--bpe-dir", bpe)
    assert "50257 tokens; 2 rows of padding" in capfd.readouterr().out
    assert len(checkpoint.ModelFolder(asked).tokenizer) == 50257


def own_vocabulary(folder, **config):
    """A byte tokenizer without `<|endoftext|>` in a GPT-2 folder."""
    foreign.gpt2(n_layer=1, n_embd=8, vocab_size=256).save_pretrained(str(folder))
    ByteTokenizer().fast_tokenizer().save_pretrained(str(folder))
    path = folder / "tokenizer.json"
    edit(path, added_tokens=[])
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    edit(folder / "config.json", **({"bos_token_id": None, "eos_token_id": None} | config))
    return folder


def test_a_folder_without_an_end_of_text_says_so(tmp_path, capsys):
    out = converted(own_vocabulary(tmp_path / "src"), tmp_path / "out")
    assert "has no end-of-text token" in capsys.readouterr().out
    assert "The tokenizer has no end-of-text token" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["eos_token_id"] is None
    assert len(checkpoint.ModelFolder(out).tokenizer) == 256
    argv = ["--model", str(out), "--max-tokens", "5", "--temp", "0"]
    assert generate.main([*argv, "--prompt", "ab"]) == 0
    line = refusal(capsys, *argv, "--prompt", "", command=generate.main)
    assert "has no end-of-text token to start from; give a --prompt" in line


def test_the_end_of_text_that_only_the_configuration_names(tmp_path):
    out = converted(own_vocabulary(tmp_path / "src", eos_token_id=10), tmp_path / "out")
    assert checkpoint.ModelFolder(out).tokenizer.eos_token_id == 10
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 10


def nanogpt(folder, characters, rows=None, **changes):
    """nanoGPT's ckpt.pt and, as data/shakespeare_char/prepare.py writes it, meta.pkl."""
    folder.mkdir()
    rows = rows or len(characters)
    model = foreign.gpt2(activation_function="gelu", vocab_size=rows, n_layer=1, n_embd=8)
    foreign.save_nanogpt(folder / "ckpt.pt", model)
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
        **changes,
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder / "ckpt.pt"


def test_nanogpts_characters(tmp_path, capsys):
    characters = sorted(set("\n !'Hello, wörld\t東京"))
    src = nanogpt(tmp_path / "src", characters)
    out = converted(src, tmp_path / "out")
    assert "has no end-of-text token" in capsys.readouterr().out
    for tokenizer in (
        checkpoint.ModelFolder(out).tokenizer,
        AutoTokenizer.from_pretrained(str(out), trust_remote_code=True),
    ):
        text = "Hello,\n\n  wörld! 東京\t'"
        ids = tokenizer.encode(text)
        assert ids == [characters.index(c) for c in text]
        assert tokenizer.decode(ids) == text
    argv = ["--model", str(out), "--max-tokens", "8", "--json"]
    assert generate.main([*argv, "--prompt", "Hello"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["text"] == "".join(characters[i] for i in made["token_ids"])
    line = refusal(capsys, *argv, "--prompt", "Xylophone", command=generate.main)
    assert "cannot be encoded by this model's tokenizer" in line


def test_characters_can_be_named(tmp_path):
    src = nanogpt(tmp_path / "src", "abc")
    meta = (tmp_path / "src" / "meta.pkl").rename(tmp_path / "meta.pkl")
    out = converted(src, tmp_path / "out", "--tokenizer", meta)
    assert checkpoint.ModelFolder(out).tokenizer.encode("cab") == [2, 0, 1]


class Malice:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (pickle.dumps(Malice()), "refused, since it holds more than plain values (STACK_GLOBAL)"),
        (pickle.dumps(Malice(), 0), "refused, since it holds more than plain values (GLOBAL)"),
        (pickle.dumps({"itos": {0: Malice()}}), "more than plain values"),
        (b"", "not readable as a pickle"),
        (b"\x80\x04K\x01r\xff\xff\xff\x7f.", "not readable as a pickle; it is damaged"),
        (pickle.dumps([1, 2]), "has no itos with a character for every id"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "has no itos with a character for every id"),
        (pickle.dumps({"itos": {0: "a", 1: "bc"}}), "not a list of distinct characters"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "not a list of distinct characters"),
        (pickle.dumps({"itos": {0: "a", 1: 5}}), "not a list of distinct characters"),
        (
            pickle.dumps({"itos": {0: "a", 1: "b"}}),
            "has 2 characters, but the model beside it has 3",
        ),
    ],
)
def test_other_files_of_that_name(meta, message, tmp_path, capsys):
    src = nanogpt(tmp_path / "src", "abc")
    (tmp_path / "src" / "meta.pkl").write_bytes(meta)
    line = refusal(capsys, src, "--out", tmp_path / "out", command=convert.main)
    assert message in line
    assert "executed" not in capsys.readouterr().out


def spoiled(folder, change):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return folder


def with_pattern(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return lambda t: t.update(pre_tokenizer={**split, "invert": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"]["vocab"].update(q=2**31), "ids up to 2147483648; ids must go from 0"),
        (lambda t: t["model"]["vocab"].update(q=299), "256 tokens and ids up to 299"),
        (with_pattern(r"(a+)+$"), "regular expression fails on ordinary text"),
        (with_pattern(r"(\w+\s?)+$"), "regular expression fails on ordinary text"),
        (with_pattern("["), "its tokenizer cannot be read"),
    ],
)
def test_tokenizers_that_would_take_all_memory_or_for_ever(change, message, tmp_path, capfd):
    src = spoiled(own_vocabulary(tmp_path / "src"), change)
    edit(src / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    line = refusal(capfd, src, "--out", tmp_path / "out", command=convert.main)
    assert message in line


def test_a_pattern_that_gives_up_on_a_text_is_told_in_one_line(tmp_path, capfd):
    src = own_vocabulary(tmp_path / "src")
    edit(src / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    spoiled(src, with_pattern(r"(?:ab|ab)+$|."))
    out = converted(src, tmp_path / "out", "--tokenizer", src)
    argv = ["--model", out, "--max-tokens", "1", "--prompt", "ab" * 30 + "!"]
    line = refusal(capfd, *argv, command=generate.main)
    assert "cannot be encoded by this model's tokenizer" in line


def test_training_goes_on_from_a_vocabulary_with_added_tokens_once_they_are_padding(
    tmp_path, capfd
):
    src = tmp_path / "src"
    foreign.gpt2(n_layer=1, n_embd=8, vocab_size=259).save_pretrained(str(src))
    ByteTokenizer().fast_tokenizer().save_pretrained(str(src))
    edit(src / "tokenizer_config.json", additional_special_tokens=["<|user|>", "<|pad|>"])
    ours = converted(src, tmp_path / "ours")
    (tmp_path / "text").write_text("Some text to train on. " * 200)
    argv = ["--data", tmp_path / "text", "--tokenizer", "bytes", "--steps", "1",
            "--batch-size", "2", "--sample-tokens", "0"]  # fmt: skip
    line = refusal(capfd, *argv, "--init", ours, "--out", tmp_path / "run", command=train.main)
    assert "its tokenizer has 259 ids, --tokenizer bytes has 257" in line
    command = line.split("python -m convert ")[1].split()
    new = command[command.index("--out") + 1]
    assert (new, command[:3]) == ("NEW", [str(ours), "--tokenizer", "bytes"])
    less = converted(ours, tmp_path / "new", *command[1:3])
    run = ["--init", less, "--out", tmp_path / "run"]
    assert train.main([str(a) for a in (*argv, *run)]) == 0
    saved = checkpoint.ModelFolder(checkpoint.latest(tmp_path / "run")).config
    assert saved.vocab_size == 259
    other = converted(own_vocabulary(tmp_path / "other"), tmp_path / "other-ours")
    line = refusal(capfd, *argv, "--init", other, "--out", tmp_path / "run2", command=train.main)
    assert "leave --tokenizer out" in line
