"""A small file cannot request more than it holds; impossible contents are reported in one line."""

import json
import zipfile

import pytest

torch = pytest.importorskip("torch")

import foreign
import fuzz
from helpers import edit, refused, words
from safetensors.torch import load_file, save_file

from convert import __main__ as convert
from mlx_mla import checkpoint, generate
from mlx_mla.backends import get_backend
from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, score


@pytest.fixture
def told(capfd, tmp_path):
    """Convert, expecting a refusal within little memory; returns its line."""

    def run(src, *flags):
        argv = words(src, "--out", tmp_path / "out", "--tokenizer bytes", *flags)
        outcome = fuzz.run(convert.main, argv)
        assert fuzz.broken_promise(outcome) is None
        assert outcome.code == 2
        assert not (tmp_path / "out").exists()
        return outcome.stderr

    return run


@pytest.fixture
def folder(tmp_path):
    foreign.gpt2().save_pretrained(str(tmp_path / "hf"))
    return tmp_path / "hf"


def large_state() -> tuple[dict, dict]:
    """Tensors of a model of 64 GiB and its settings, each one number in the file."""
    D, V, layers = 16384, 65536, 4
    shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (64, D)}
    for i in range(layers):
        h = f"transformer.h.{i}"
        shapes |= {f"{h}.attn.c_attn.weight": (3 * D, D), f"{h}.attn.c_attn.bias": (3 * D,)}
        shapes |= {f"{h}.attn.c_proj.weight": (D, D), f"{h}.attn.c_proj.bias": (D,)}
        shapes |= {f"{h}.mlp.c_fc.weight": (4 * D, D), f"{h}.mlp.c_fc.bias": (4 * D,)}
        shapes |= {f"{h}.mlp.c_proj.weight": (D, 4 * D), f"{h}.mlp.c_proj.bias": (D,)}
        shapes |= {f"{h}.ln_{n}.{p}": (D,) for n in (1, 2) for p in ("weight", "bias")}
    shapes |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    settings = {"n_layer": layers, "n_head": 4, "n_embd": D, "block_size": 64, "vocab_size": V}
    return {n: torch.zeros(1).expand(s) for n, s in shapes.items()}, settings


def test_tensors_that_repeat_one_number(told, tmp_path):
    state, settings = large_state()
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": settings}, path)
    assert path.stat().st_size < 50_000
    line = told(path)
    assert (
        "tensor transformer.wte.weight is not a plain array with all its values in the file" in line
    )


def test_tensors_that_are_all_the_same(told, tmp_path):
    model = foreign.gpt2(activation_function="gelu", n_layer=6)
    foreign.save_nanogpt(tmp_path / "ckpt.pt", model)
    values = torch.load(tmp_path / "ckpt.pt")
    first = values["model"]
    for name in first:
        block = name.split(".h.")
        if len(block) == 2:
            rest = block[1].split(".", 1)[1]
            first[name] = first[f"_orig_mod.transformer.h.0.{rest}"]
    torch.save(values, tmp_path / "shared.pt")
    assert "share more values than a tied head does" in told(tmp_path / "shared.pt")


def test_archives_that_unpack_to_more_than_they_are(told, tmp_path):
    path = tmp_path / "ckpt.pt"
    foreign.save_nanogpt(path, foreign.gpt2(activation_function="gelu"))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "small.pt", "w", 8) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    assert "a compressed archive, which torch.save does not write" in told(tmp_path / "small.pt")


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.zeros(300, 32).to_sparse(),
        lambda: torch.empty(300, 32, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(300, 32), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
def test_tensors_that_are_no_arrays(odd, told, tmp_path):
    path = tmp_path / "ckpt.pt"
    foreign.save_nanogpt(path, foreign.gpt2(activation_function="gelu"))
    values = torch.load(path)
    values["model"]["_orig_mod.transformer.wte.weight"] = odd()
    values["model"].pop("_orig_mod.lm_head.weight")
    torch.save(values, path)
    line = told(path)
    assert "not a plain array" in line or "not readable as a PyTorch checkpoint" in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_numbers_of_another_kind(dtype, told, folder, tmp_path):
    name = "transformer.wte.weight"
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    save_file(tensors | {name: tensors[name].to(dtype)}, str(path), {"format": "pt"})
    assert f"tensor {name} holds " in told(folder)
    path.unlink()
    torch.save(tensors | {name: tensors[name].to(dtype)}, folder / "pytorch_model.bin")
    assert f"tensor {name} holds " in told(folder)


def test_models_in_wrappers_are_unwrapped_in_every_format(folder, tmp_path):
    whole = load_file(str(folder / "model.safetensors"))
    expected = None
    for prefix in ("", "_orig_mod.", "module._orig_mod."):
        for name in ("model.safetensors", "pytorch_model.bin"):
            for path in folder.glob("*model.*"):
                path.unlink()
            state = {prefix + n: t for n, t in whole.items()}
            if name.endswith(".bin"):
                torch.save(state, folder / name)
            else:
                save_file(state, str(folder / name), {"format": "pt"})
            out = tmp_path / f"out-{prefix}{name}"
            assert convert.main([str(folder), "--out", str(out), "--tokenizer", "bytes"]) == 0
            weights = (out / checkpoint.WEIGHTS).read_bytes()
            expected = expected or weights
            assert weights == expected


def test_a_tensor_that_is_there_twice(told, folder):
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    name = "transformer.ln_f.bias"
    save_file(tensors | {f"module.{name}": tensors[name] + 1}, str(path), {"format": "pt"})
    assert f"has tensor {name} twice, under names from wrapping modules" in told(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": 5}, "architectures must be a list of names, not 5"),
        ({"architectures": [["x"]]}, "architectures must be a list of names, not "),
        ({"architectures": {"GPT2LMHeadModel": 1}}, "architectures must be a list of names, not "),
        ({"activation_function": ["gelu"]}, "activation_function ['gelu'] is not supported"),
        ({"activation_function": None}, "activation_function None is not supported"),
        ({"n_layer": 3_000_000}, "n_layer"),
        ({"n_layer": 2**70}, "n_layer"),
        ({"n_embd": 1e308}, "n_embd"),
        ({"n_head": True}, "n_head"),
        ({"n_positions": []}, "n_positions"),
        ({"n_inner": {}}, "n_inner"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon"),
    ],
)
def test_configurations_of_any_type(changes, message, told, folder):
    edit(folder / "config.json", **changes)
    line = told(folder)
    assert str(folder / "config.json") in line
    assert message in line.replace("--", "").replace("-", "_")


def test_an_end_of_text_of_any_type_is_none(folder, tmp_path):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for i, odd in enumerate((True, -1, "x", [256], 1.5, {}, 2**70, None)):
        path.write_text(json.dumps(values | {"eos_token_id": odd}))
        out = tmp_path / f"out{i}"
        assert convert.main([str(folder), "--out", str(out), "--tokenizer", "bytes"]) == 0
        assert json.loads((out / "config.json").read_text())["eos_token_id"] == 256


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b'{"n_layer": ' + b"9" * 5000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(content, name, told, folder):
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    assert str(folder / name) in told(folder)


@pytest.mark.parametrize("size", [4, 5, 7, 1023])
def test_llmc_files_of_a_few_bytes(size, told, tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(((20240326).to_bytes(4, "little") + bytes(1020))[:size])
    assert "shorter than llm.c's header" in told(path)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["safetensors", "bin", "nanogpt", "llmc", "ours"])
def test_weights_that_are_not_finite(odd, form, told, folder, tmp_path, capfd):
    model = foreign.gpt2(activation_function="gelu" if form == "nanogpt" else "gelu_new")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] = odd
    src = folder
    if form == "safetensors":
        model.save_pretrained(str(folder))
    elif form == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif form == "nanogpt":
        foreign.save_nanogpt(src := tmp_path / "ckpt.pt", model)
    elif form == "llmc":
        foreign.save_llmc(src := tmp_path / "model.bin", model, 3, 280)
    else:
        src = tmp_path / "ours"
        assert convert.main([str(folder), "--out", str(src), "--tokenizer", "bytes"]) == 0
        (src / "SHA256SUMS").unlink()
        tensors = load_file(str(src / checkpoint.WEIGHTS))
        tensors["transformer.h.1.mlp.c_fc.weight"][5, 3] = odd
        save_file(tensors, str(src / checkpoint.WEIGHTS), {"format": "mlx"})
    line = told(src)
    assert "transformer.h.1.mlp.c_fc.weight has values that are not finite" in line
    if form == "ours":
        assert "not finite" in refused(
            capfd, src, "--out", tmp_path / "mla", "--to mla --rank 8", command=convert.main
        )


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_scores_that_only_a_temperature_makes_overflow(backend, folder, tmp_path, capfd):
    """The most likely token is then certain, or the overflow is reported, without a traceback."""
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    tensors["transformer.ln_f.weight"][:] = 0
    tensors["transformer.ln_f.bias"][:] = 0
    tensors["transformer.ln_f.bias"][0] = 3e38
    tensors["transformer.wte.weight"][:, 0] = 0.1
    tensors["transformer.wte.weight"][65, 0] = 1
    save_file(tensors, str(path), {"format": "pt"})
    out = tmp_path / "out"
    assert convert.main([str(folder), "--out", str(out), "--tokenizer", "bytes"]) == 0
    argv = ["--model", str(out), "--backend", backend, "--device", "cpu", "--max-tokens", "2"]
    outcome = fuzz.run(generate.main, [*argv, "--prompt", "ab", "--temp", "0.5"])
    assert fuzz.broken_promise(outcome) is None
    assert outcome.stdout == "AA\n" or "scores are not finite" in outcome.stderr


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_weights_that_are_finite_and_overflow(backend, folder, tmp_path, capfd):
    """They convert, as they are; what cannot be computed with them is said where it is tried."""
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    tensors["transformer.ln_f.weight"][:] = 3e38
    save_file(tensors, str(path), {"format": "pt"})
    out = tmp_path / "out"
    assert convert.main([str(folder), "--out", str(out), "--tokenizer", "bytes"]) == 0
    (tmp_path / "prompts").write_text("ab\ncde\n")
    common = ("--model", out, "--backend", backend, "--device", "cpu", "--max-tokens", "3")
    for flags in (
        ("--prompt", "ab"),
        ("--prompt", "ab", "--temp", "0"),
        ("--prompts-file", tmp_path / "prompts"),
    ):
        assert "scores are not finite" in refused(capfd, *common, *flags, command=generate.main)
    scorer = get_backend(backend, "cpu").scorer(checkpoint.ModelFolder(out))
    with pytest.raises(UserError, match="scores are not finite"):
        score(scorer, [Request((1, 2), ((3, 4), (5,)))])
