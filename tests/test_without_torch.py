"""PyTorch is optional: commands and conversion in processes that have none.

`without_torch/sitecustomize.py` hides it, so that this is tested where it is installed too. The
processes that other tests start have none either: training, generation, serving, and every tool of
stock mlx-lm on our folders.
"""

import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import WITHOUT_TORCH, greedy, python, ran, tiny_train

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """An environment in which `import torch` fails, and remote code goes to a cache of its own."""
    env = {**WITHOUT_TORCH, "HF_HOME": str(tmp_path_factory.mktemp("hf"))}
    hidden = subprocess.run(python("-c", "import torch"), env=env, capture_output=True, check=False)
    assert hidden.returncode != 0
    return env


@pytest.fixture
def run(env, tmp_path):
    def go(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return ran(*args, code=code, env=env, cwd=tmp_path, timeout=300)

    return go


@pytest.fixture(scope="module")
def mha(tmp_path_factory, text_file) -> Path:
    """A run of multi-head attention."""
    out = tmp_path_factory.mktemp("mha") / "run"
    flags = ("--attention mha --qk-rope-head-dim 0 --steps 2 --data", text_file)
    return tiny_train(out, *flags)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "command",
    ["train", *(pytest.param(c, marks=pytest.mark.slow) for c in ("generate", "evaluate"))],
)
def test_the_torch_backend_is_refused_in_one_line(run, command, folder, text_file, tmp_path):
    flags = {
        "train": ["--data", text_file, "--out", tmp_path / "run"],
        "generate": ["--model", folder, "--prompt", "x"],
        "evaluate": ["--model", folder],
    }[command]
    done = run("-m", f"mlx_mla.{command}", *flags, "--backend", "torch", code=2)
    assert "--backend torch: torch is not installed; pip install torch" in refusal(done)


def test_transformers_reads_configuration_and_tokenizer(run, folder):
    code = (
        "import sys; from transformers import AutoConfig, AutoTokenizer; folder = sys.argv[1]; "
        "config = AutoConfig.from_pretrained(folder, trust_remote_code=True); tokenizer = "
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True); "
        "print(type(config).__name__, config.qk_rope_head_dim, tokenizer.encode('abc'))"
    )
    assert run("-c", code, folder).stdout.strip() == "MLAGPT2Config 8 [97, 98, 99]"


@pytest.mark.slow
def test_the_doctor_has_nothing_to_fix_about_it(run):
    said = run("-m", "mlx_mla.doctor").stdout
    assert "PyTorch                 not installed; optional" in said
    assert "torch" not in said.partition("to fix")[2]


@pytest.mark.slow
def test_convert_reads_our_folders_and_bfloat16(run, folder, tmp_path):
    """A folder that mlx-lm has saved in bfloat16 comes back as what bfloat16 keeps of each
    value."""
    import mlx.core as mx

    config, half = checkpoint.ModelFolder(folder).config, tmp_path / "half"
    run(
        *(
            "-m",
            "mlx_lm",
            "convert",
            "--hf-path",
            folder,
            "--mlx-path",
            half,
            "--dtype",
            "bfloat16",
        ),
        "--trust-remote-code",
    )
    expected = checkpoint.ModelFolder(folder).weights(config)
    for source, kept in ((folder, mx.float32), (half, mx.bfloat16)):
        out = tmp_path / f"from-{source.name}"
        run("-m", "convert", source, "--out", out)
        for name, values in checkpoint.ModelFolder(out).weights(config).items():
            np.testing.assert_array_equal(
                values, np.array(mx.array(expected[name]).astype(kept).astype(mx.float32))
            )


@pytest.mark.slow
def test_convert_makes_attention_latent_by_the_weights_alone(run, mha, tmp_path):
    run("-m", "convert", mha, "--out", tmp_path / "mla", "--to", "mla", "--rank", "32")
    folders = [checkpoint.ModelFolder(checkpoint.model_folder(p)) for p in (mha, tmp_path / "mla")]
    before, after = (greedy(get_backend("mlx").decoder(f), b"The ", 8) for f in folders)
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
