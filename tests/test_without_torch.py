"""PyTorch is optional: commands, conversion and stock mlx-lm on our folders, in processes that have
none.

A `sitecustomize` hides it, so that this is tested where it is installed too.
"""

import json
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, mlx_lm_server, python, ran, tiny_train, words

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend

ROOT = Path(__file__).resolve().parents[1]
HIDE = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: (
    None if name.partition(".")[0] == "torch" else find(name, *args)
)
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """An environment in which `import torch` fails, and remote code goes to a cache of its own."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(folder), str(ROOT)])
    env = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    hidden = subprocess.run(python("-c", "import torch"), env=env, capture_output=True, check=False)
    assert hidden.returncode != 0
    return env


@pytest.fixture
def run(env, tmp_path):
    def go(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return ran(*args, code=code, env=env, cwd=tmp_path, timeout=300)

    return go


@pytest.fixture(scope="module")
def model(tiny_run) -> Path:
    folder = checkpoint.latest(tiny_run)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def mha(tmp_path_factory, text_file) -> Path:
    """A run of multi-head attention."""
    out = tmp_path_factory.mktemp("mha") / "run"
    flags = ("--attention mha --qk-rope-head-dim 0 --steps 2 --data", text_file)
    return tiny_train(out, *flags)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_train_and_generate(run, text_file, tmp_path):
    flags = ("--steps 2 --data", text_file, "--out", tmp_path / "run")
    done = run("-m", "mlx_mla.train", *TINY, *flags)
    assert "validation loss" in done.stdout and "PyTorch" not in done.stderr
    flags = ("--model", tmp_path / "run", "--max-tokens 4 --prompt", "The ")
    done = run("-m", "mlx_mla.generate", *flags)
    assert done.stderr.startswith("[4 prompt tokens")


@pytest.mark.parametrize("command", ["train", "generate", "evaluate"])
def test_the_torch_backend_is_refused_in_one_line(run, command, model, text_file, tmp_path):
    flags = {
        "train": ["--data", text_file, "--out", tmp_path / "run"],
        "generate": ["--model", model, "--prompt", "x"],
        "evaluate": ["--model", model],
    }[command]
    done = run("-m", f"mlx_mla.{command}", *flags, "--backend", "torch", code=2)
    assert "--backend torch: torch is not installed; pip install torch" in refusal(done)


def test_transformers_reads_configuration_and_tokenizer(run, model):
    code = (
        "import sys; from transformers import AutoConfig, AutoTokenizer; folder = sys.argv[1]; "
        "config = AutoConfig.from_pretrained(folder, trust_remote_code=True); tokenizer = "
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True); "
        "print(type(config).__name__, config.qk_rope_head_dim, tokenizer.encode('abc'))"
    )
    assert run("-c", code, model).stdout.strip() == "MLAGPT2Config 8 [97, 98, 99]"


def test_the_doctor_has_nothing_to_fix_about_it(run):
    said = run("-m", "mlx_mla.doctor").stdout
    assert "PyTorch                 not installed; optional" in said
    assert "torch" not in said.partition("to fix")[2]


def greedy(model: Path, prompt: str, tokens: int) -> str:
    from mlx_mla.decoding.request import GenerationOptions

    decoder = get_backend("mlx").decoder(checkpoint.ModelFolder(model))
    options = GenerationOptions(temp=0, max_tokens=tokens)
    return "".join(p.text for p in decoder.stream(list(prompt.encode()), options))


def test_mlx_lm_generates_what_we_do(run, model):
    flags = words("--model", model, "--trust-remote-code --temp 0 --max-tokens 12 --prompt", "The ")
    text = run("-m", "mlx_lm", "generate", *flags).stdout
    assert text.split("==========\n")[1].rstrip("\n").strip() == greedy(model, "The ", 12).strip()


def test_mlx_lm_quantises_and_the_result_generates(run, model, tmp_path):
    q = tmp_path / "q8"
    flags = ("--trust-remote-code", "-q", "--q-bits", "8", "--q-group-size", "32")
    run("-m", "mlx_lm", "convert", "--hf-path", model, "--mlx-path", q, *flags)
    assert (q / "configuration_mla_gpt2.py").is_file()
    flags = words("--model", q, "--trust-remote-code --temp 0 --max-tokens 8 --prompt", "The ")
    assert "==========" in run("-m", "mlx_lm", "generate", *flags).stdout


@pytest.mark.slow
def test_mlx_lm_fine_tunes(run, model, tmp_path):
    (data := tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": f"a story, {i}"}) + "\n" for i in range(4))
        )
    flags = ("--model", model, "--data", data, "--adapter-path", tmp_path / "adapter")
    how = "--train --iters 2 --batch-size 2 --num-layers 1 --val-batches 1 --trust-remote-code"
    run("-m", "mlx_lm", "lora", *flags, how)
    assert (tmp_path / "adapter" / "adapters.safetensors").is_file()


@pytest.mark.slow
def test_mlx_lm_serves(env, model):
    with mlx_lm_server(model, "--trust-remote-code", env=env) as ask:
        assert ask("The ")


def test_convert_reads_our_folders_and_bfloat16(run, model, tmp_path):
    """A folder that mlx-lm has saved in bfloat16 comes back as what bfloat16 keeps of each
    value."""
    import mlx.core as mx

    config, half = checkpoint.ModelFolder(model).config, tmp_path / "half"
    run(
        *("-m", "mlx_lm", "convert", "--hf-path", model, "--mlx-path", half, "--dtype", "bfloat16"),
        "--trust-remote-code",
    )
    expected = checkpoint.ModelFolder(model).weights(config)
    for source, kept in ((model, mx.float32), (half, mx.bfloat16)):
        out = tmp_path / f"from-{source.name}"
        run("-m", "convert", source, "--out", out)
        for name, values in checkpoint.ModelFolder(out).weights(config).items():
            np.testing.assert_array_equal(
                values, np.array(mx.array(expected[name]).astype(kept).astype(mx.float32))
            )


def test_convert_makes_attention_latent_by_the_weights_alone(run, mha, tmp_path):
    run("-m", "convert", mha, "--out", tmp_path / "mla", "--to", "mla", "--rank", "32")
    before, after = (greedy(checkpoint.model_folder(p), "The ", 8) for p in (mha, tmp_path / "mla"))
    assert before == after  # rank n_embd is exact
    run("-m", "convert", mha, "--out", tmp_path / "hf", "--to", "hf")
    run("-m", "convert", tmp_path / "hf", "--out", tmp_path / "again")


def test_convert_says_what_needs_torch(run, mha, tmp_path, text_file):
    flags = ("--out", tmp_path / "out", "--to", "mla", "--rank", "8", "--calibration", text_file)
    told = refusal(run("-m", "convert", mha, *flags, code=2))
    assert told == "error: --calibration needs PyTorch; install it with: pip install torch\n"
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}))
    told = refusal(run("-m", "convert", tmp_path / "model.pt", "--out", tmp_path / "out", code=2))
    assert told.endswith(
        "model.pt: reading a pickled checkpoint needs PyTorch; install it with: pip install torch\n"
    )
    assert not (tmp_path / "out").exists()
