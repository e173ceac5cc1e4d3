"""Every way to give `convert` the wrong thing ends in one line, exit code 2, and no folder."""

import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import time
import zipfile

import pytest

torch = pytest.importorskip("torch")

import foreign
import numpy as np
from helpers import WITHOUT_TORCH, edit, python
from helpers import refused as _refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert import __main__ as convert


@pytest.fixture
def refused(capsys, tmp_path):
    """Convert, expecting a refusal; returns its line."""

    def run(src, *flags, tokenizer="bytes"):
        out = tmp_path / "out"
        line = _refused(
            capsys, src, "--out", out, "--tokenizer", tokenizer, *flags, command=convert.main
        )
        assert not out.exists()
        assert not list(tmp_path.glob(".out*")), "a half-written folder is left"
        return line

    return run


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder to spoil."""
    foreign.gpt2().save_pretrained(str(tmp_path / "hf"))
    return tmp_path / "hf"


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), {"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]},
         "Gemma3ForCausalLM .* is not supported; supp"),
        ({"model_type": ["gpt2"]}, r"\(model_type \['gpt2'\]\) is not supported"),
        ({"architectures": ["GPT2ForSequenceClassification"]},
         "GPT2ForSequenceClassification .* is not supported"),
        ({"activation_function": "relu"},
         "activation_function 'relu' is not supported; supported are gelu_new"),
        ({"add_cross_attention": True}, "add_cross_attention is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"tie_word_embeddings": False}, r"missing tensor lm_head\.weight"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' is not a value of type bool"),
        ({"n_layer": "two"}, "n_layer = 'two' is not a value of type int"),
        ({"n_layer": 10**9}, "n_layer must be at most 1,000, not 1000000000"),
        ({"n_head": 5}, "not divisible"),
        ({"layer_norm_epsilon": "small"},
         "layer_norm_epsilon = 'small' is not a value of type float"),
        ({"n_layer": 3}, r"missing tensors transformer\.h\.2\..* and 9 more"),
        ({"n_layer": 1}, r"unexpected tensors transformer\.h\.1\..*"),
        ({"n_inner": 64},
         r"mlp\.c_fc\.weight has shape \(32, 128\), but the configuration requires \(32, 64\)"),
        ({"vocab_size": 301},
         r"wte\.weight has shape \(300, 32\), but the configuration requires \(301, 32\)"),
    ],
)  # fmt: skip
def test_configurations_of_hugging_face(changes, message, folder, refused):
    edit(folder / "config.json", **changes)
    assert re.search(message, refused(folder))


def test_tensors_that_are_missing_unexpected_or_misshaped_are_named(folder, refused):
    name = "transformer.h.1.attn.c_attn.weight"
    whole = load_file(str(folder / "model.safetensors"))[name]
    edit_weights(folder, lambda t: t.pop(name))
    assert f"missing tensor {name}" in refused(folder)
    edit_weights(folder, lambda t: t.update({name: whole.T}))
    assert f"tensor {name} has shape (96, 32), but the configuration requires (32, 96)" in refused(
        folder
    )
    edit_weights(folder, lambda t: t.update({name: whole, "transformer.h.0.attn.rotary": whole}))
    assert "unexpected tensor transformer.h.0.attn.rotary" in refused(folder)


def test_values_that_are_not_finite(folder, refused):
    edit_weights(folder, lambda t: t["transformer.ln_f.bias"].__setitem__(3, np.nan))
    assert "transformer.ln_f.bias has values that are not finite" in refused(folder)


def test_an_output_head_of_its_own(folder, refused):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))
    assert "lm_head.weight differs from" in refused(folder)


def test_truncated_safetensors_and_lost_files(folder, refused):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "may be truncated" in refused(folder)
    path.unlink()
    assert "has no weights" in refused(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wte": "model-1.safetensors"}}))
    assert "model-1.safetensors: no such file" in refused(folder)
    index.write_text(json.dumps({"weight_map": {"wte": "../hf/config.json"}}))
    assert "no such file" in refused(folder)
    index.write_text("[]")
    assert "not a JSON object" in refused(folder)
    (folder / "config.json").write_text("{")
    assert "not valid JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["alone", "model", "config", "optimizer", "legacy pickle"])
def test_malicious_pickles_are_refused_and_never_run(place, refused, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "model.pt"
    values = {"model": foreign.linear_state(foreign.gpt2()), "config": {}, "optimizer": {}}
    if place == "legacy pickle":
        path.write_bytes(pickle.dumps(Malice(marker), protocol=2))
    else:
        torch.save(Malice(marker) if place == "alone" else values | {place: Malice(marker)}, path)
    line = refused(path)
    assert "refused, since it would run code when opened" in line
    assert "mkdir" in line
    assert not marker.exists()


NESTED = {
    "as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x00s.",
    "in lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "through the memo": b"\x80\x02})q\x00" + b"\x85q\x00h\x00\x86" * 150_000 + b"K\x00s.",
}


@pytest.mark.parametrize("values", NESTED)
@pytest.mark.parametrize("place", ["meta.pkl", "data.pkl", "legacy"])
def test_pickles_that_nest_too_deeply_are_refused_before_anything_is_made(
    values, place, refused, tmp_path
):
    """Hashing such a key overflows the stack, which ends the process."""
    path = tmp_path / ("meta.pkl" if place == "meta.pkl" else "ckpt.pt")
    path.write_bytes(NESTED[values])
    if place == "data.pkl":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", NESTED[values])
            archive.writestr("archive/version", "3\n")
    if place == "meta.pkl":
        foreign.gpt2().save_pretrained(str(tmp_path / "hf"))
        line = refused(tmp_path / "hf", tokenizer=str(path))
    else:
        line = refused(path)
    assert f"{path}: refused, since its values are nested more than 100 levels deep" in line


def test_a_configuration_whose_bias_is_a_tensor_is_refused(refused, tmp_path):
    path = tmp_path / "ckpt.pt"
    foreign.save_nanogpt(path, foreign.gpt2(activation_function="gelu"))
    values = torch.load(path)
    values["model_args"]["bias"] = torch.tensor([])
    torch.save(values, path)
    assert "its bias is a value of type Tensor, not True or False" in refused(path)


def test_a_class_that_is_only_called_like_an_allowed_one_is_refused(refused, tmp_path):
    foreign.save_build_nanogpt(tmp_path / "model.pt", foreign.gpt2(), module="evil")
    assert "evil.GPTConfig" in refused(tmp_path / "model.pt")


@given(data=st.data())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_or_changed_pickles(data, refused, tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    foreign.save_nanogpt(path, foreign.gpt2(n_layer=1, n_embd=8, activation_function="gelu"))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert str(path) in refused(path)
    # Changed bytes of the pickle itself: refused, or (where only a number changed) converted; never
    # a traceback.
    with zipfile.ZipFile(tmp_path / "changed.pt", "w") as new:
        path.write_bytes(content)
        with zipfile.ZipFile(path) as old:
            for entry in old.infolist():
                inner = bytearray(old.read(entry))
                if entry.filename.endswith("data.pkl"):
                    inner[data.draw(st.integers(0, len(inner) - 1))] = data.draw(
                        st.integers(0, 255)
                    )
                new.writestr(entry.filename, bytes(inner))
    out = tmp_path / "changed"
    code = convert.main([str(tmp_path / "changed.pt"), "--out", str(out), "--tokenizer", "bytes"])
    assert code in (0, 2)
    if code == 0:
        subprocess.run(["rm", "-r", str(out)], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:500], "shorter than llm.c's header"),
        (lambda b: b[:-1], "the header requires"),
        (lambda b: b + b"x", "the header requires"),
        (
            lambda b: b[:4] + np.int32(1).tobytes() + b[8:],
            "version 1 is not supported; supported are 3",
        ),
        (
            lambda b: b[:16] + np.int32(2**30).tobytes() + b[20:],
            "n_layer must be at most 1,000, not 1073741824",
        ),
        (lambda b: b[:16] + np.int32(-1).tobytes() + b[20:], "n_layer must be at least 1"),
        (lambda b: b[:28] + np.int32(7).tobytes() + b[32:],
         "7 padded rows for a vocabulary of 280"),
        (lambda b: np.int32(20240520).tobytes() + b[4:], "token ids of llm.c, not a model"),
        (lambda b: np.int32(20240801).tobytes() + b[4:], "token ids of llm.c, not a model"),
        (lambda b: b"GGUF" + b[4:], "not a known checkpoint format"),
    ],
)  # fmt: skip
def test_llmc_files(change, message, refused, tmp_path):
    path = tmp_path / "model.bin"
    foreign.save_llmc(path, foreign.gpt2(), 3, 280)
    path.write_bytes(change(path.read_bytes()))
    assert message in refused(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a value of type list"),
        ({"model": [1]}, "holds no state dict"),
        ({"model": {"a": 1}}, "'a' is not a tensor"),
        ({"model": {"a": torch.zeros(2)}}, "no transformer.wte.weight"),
        ({"model": foreign.linear_state(foreign.gpt2())},
         "does not record its heads and activation"),
        ({"model": foreign.linear_state(foreign.gpt2()), "config": {"n_layer": 2}},
         "lacks n_head, n_embd, block_size"),
        ({"model": foreign.linear_state(foreign.gpt2()), "config": 3},
         "the configuration is a value of type int"),
        (foreign.Original().state_dict(), "and 32 is not a multiple of 64; give --n-head"),
    ],
)  # fmt: skip
def test_pickles_that_hold_something_else(content, message, refused, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "mla"), "needs --rank R or --rank-budget R, from 1 to the model's n_embd, 32"),
        (("--to", "mla", "--rank-budget", "33"), "--rank-budget must be from 1 to the model's "
                                                 "n_embd, 32"),
        (("--to", "mla", "--rank", "4", "--rank-budget", "4"), "exclude each other"),
        (("--rank-budget", "4"), "--rank-budget requires --to mla"),
        (("--to", "mla", "--rank", "33"), "--rank must be from 1 to the model's n_embd, 32"),
        (("--to", "mla", "--rank", "0"), "--rank must be from 1"),
        (("--to", "mla", "--rank", "-4"), "--rank must be from 1"),
        (("--rank", "4"), "--rank requires --to mla"),
        (("--to", "mla", "--rank", "4", "--calibration", "nowhere.txt"), "nowhere.txt: cannot be "
                                                                         "read: No such file"),
        (("--to", "gguf",), "gguf"),
        (("--revision", "main"), "--revision requires a hub id"),
        (("--n-head", "2"), "records its number of heads"),
        (("--renk", "4"), "did you mean --rank"),
        (("--calibration-tokens", "5"), "--calibration-tokens requires --calibration"),
        (("--to", "mla", "--calibration", "builtin", "--held-out-tokens", "-1"),
         "--held-out-tokens must not be negative"),
    ],
)  # fmt: skip
def test_flags(flags, message, folder, refused):
    assert message in refused(folder, *flags)


def test_calibration_text(folder, refused, tmp_path):
    text = tmp_path / "text.txt"
    for content, message in (
        (b"", "has 1 tokens to calibrate on, fewer than a window of "),
        (b"a\xff" * 500, "not UTF-8"),
        (gzip.compress(b"a" * 5000), "is compressed, not text; give a UTF-8 text file"),
        (b"a\0" * 500, "is binary (it has NUL characters), not text"),
    ):
        text.write_bytes(content)
        assert message in refused(folder, "--to", "mla", "--rank", "4", "--calibration", text)


@pytest.mark.parametrize("spread", [3e3, 1e18])
def test_a_model_that_has_diverged(spread, refused, text_file, tmp_path):
    foreign.gpt2(spread=spread).save_pretrained(str(tmp_path / "far"))
    flags = ("--to", "mla", "--rank", "4", "--calibration", text_file)
    said = refused(tmp_path / "far", *flags, "--calibration-tokens", "500")
    assert "so its training has diverged; take an earlier checkpoint" in said


def test_latent_models_have_no_way_back(tiny_run, refused):
    said = refused(tiny_run, "--to", "hf")
    assert "--to hf needs GPT-2's own attention, but this model has --attention mla" in said
    said = refused(tiny_run, "--to", "mla", "--rank", "4")
    assert "--to mla: the model's attention is MLA already; leave out --to mla" in said


def test_tokenizers(folder, refused, tmp_path, shared_data):
    assert "the gpt2 tokenizer has 50257 ids, but the model has 300 rows" in refused(
        folder, "--bpe-dir", shared_data / "gpt2_bpe", tokenizer="gpt2"
    )
    assert "neither a folder with tokenizer.json" in refused(
        folder, tokenizer=str(tmp_path / "none")
    )
    (folder / "tokenizer.json").write_text("{}")
    assert "its tokenizer cannot be read" in refused(folder, tokenizer=str(folder))


def test_sources_that_are_not_there(refused, tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nothing")
    assert "cannot be reached to download it" in refused("openai-community/gpt2-of-nobody")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    assert "a single file; give its folder" in refused(tmp_path / "model.safetensors")


def test_out_that_is_taken(folder, capsys, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes").write_text("mine")
    assert "exists and is not empty" in _refused(
        capsys, folder, "--out", taken, command=convert.main
    )
    assert (taken / "notes").read_text() == "mine"
    assert "is a file" in _refused(capsys, folder, "--out", taken / "notes", command=convert.main)
    (taken / "notes").unlink()
    # An empty folder is fine.
    assert convert.main([str(folder), "--out", str(taken), "--tokenizer", "bytes"]) == 0


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_an_interrupted_conversion_leaves_no_folder(how, folder, tmp_path, monkeypatch):
    """Stopped in the middle of writing, before the tokenizer."""
    script = (
        "import sys, time; from convert import __main__ as c; from mlx_mla import checkpoint as k\n"
        "def slow(folder, *a):\n"
        " (folder / 'model.safetensors').write_bytes(b'x' * 1000); print('writing', flush=True); "
        "time.sleep(60)\n"
        "k.write_model = slow\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    argv = python("-c", script, str(folder), "--out", str(out), "--tokenizer", "bytes")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(argv, env=WITHOUT_TORCH, **pipes)
    for line in process.stdout:
        if line == "writing\n":
            break
    time.sleep(0.1)
    process.send_signal(how)
    _, err = process.communicate(timeout=30)
    assert not out.exists()
    if how == signal.SIGINT:
        assert (process.returncode, err.strip().splitlines()[-1]) == (130, "interrupted")
        assert not list(tmp_path.glob(".out*"))
