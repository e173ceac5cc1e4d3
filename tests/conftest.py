"""Shared fixtures. Tests never reach the network."""

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Newer GPUs multiply float32 matrices in TF32 by default, three digits short of the tests'
# tolerances. MLX reads this once, at its first product; commands that tests start inherit it.
os.environ["MLX_ENABLE_TF32"] = "0"
# Two workers on two cores, with two threads each, would wait for one another.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# A shell ignores these for what it runs in the background, and so would the commands that tests
# start and interrupt.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

import mlx_mla.backends.mlx  # noqa: F401  (before mlx, whatever a test imports first)

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"

import fuzz
import mlx.core as mx
import numpy as np
import pytest
from fetch_data import DOWNLOADS, FOLDER
from helpers import tiny_train, words
from hypothesis import settings

from mlx_mla import checkpoint, pictures
from mlx_mla.backends import contract
from mlx_mla.training import metrics

SEED = 17  # of the slow fuzz tests

settings.register_profile("default", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzzing")
    group.addoption("--fuzz-seed", type=int, help="another seed, and a table of what was found")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--fuzz-seed"):
        terminalreporter.write_line(fuzz.table())


@pytest.fixture
def fuzz_many(request, tmp_path):
    """`fuzz.fuzz` of a surface by its name, with the seed that the command line asks for."""

    def run(name, main, spoil, cases):
        seed = request.config.getoption("--fuzz-seed") or SEED
        return fuzz.fuzz(main, spoil, cases, seed, tmp_path, name)

    return run


def pytest_make_parametrize_id(val: object) -> str | None:
    """Packed bytes hold the time, and the workers of one run must give a test the same name."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs PyTorch where it is not installed: marked so, or with "torch" among its
    parameters."""
    if importlib.util.find_spec("torch") is not None:
        return
    skip = pytest.mark.skip(reason="needs PyTorch, which is optional: pip install torch")
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.get_closest_marker("torch") or any(
            isinstance(p, str) and p == "torch" for p in parameters
        ):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_device() -> Iterator[None]:
    """A test that has set MLX's default device does not set the next one's."""
    before = mx.default_device()
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real files: beside the checkout, or what tests/fetch_data.py has fetched."""
    if SHARED.is_dir():
        return SHARED
    if not all((FOLDER / name).is_file() for d in DOWNLOADS for name in d.files):
        pytest.skip("needs public data sets: python tests/fetch_data.py")
    return FOLDER


@pytest.fixture(scope="session")
def shared_corpus() -> Path:
    """Collected texts beside the checkout, which are not published as they are."""
    if not (SHARED / "corpus").is_dir():
        pytest.skip("needs the collected texts in ../shared/data/corpus")
    return SHARED / "corpus"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of a real Llama, SmolLM2-135M-Instruct, as ../shared/tools/smollm2 writes it."""
    folder = Path(os.environ.get("SMOLLM2", SHARED.parents[1] / "smollm2"))
    if not (folder / "model.safetensors").is_file():
        pytest.skip("needs SmolLM2: ../shared/tools/smollm2")
    return folder


@pytest.fixture(scope="session")
def smollm2_mla(smollm2, shared_corpus, tmp_path_factory) -> Path:
    """That model converted to MLA at half its cache, on a sixteenth of the default calibration."""
    from convert.__main__ import main

    place = tmp_path_factory.mktemp("smollm2")
    sample = shared_corpus / "fineweb_edu_sample" / "fineweb_sample.txt"
    text = place / "text.txt"
    text.write_text(sample.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    flags = "--to mla --rank 128 --calibration-tokens 4096 --held-out-tokens 1024"
    argv = words(smollm2, "--out", place / "mla", "--calibration", text, flags)
    assert main(argv) == 0
    return place / "mla"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """About 20 KB of English."""
    from mlx_mla.data.corpus import read_documents

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(read_documents("builtin"))[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, text_file) -> Path:
    """A finished run of a tiny model, 40 steps, checkpoints every 20."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return tiny_train(out, "--data", text_file, "--steps 40 --save-every 20")


@pytest.fixture(scope="session")
def folder(tiny_run) -> Path:
    """The model folder of that run's last checkpoint."""
    last = checkpoint.latest(tiny_run)
    assert last is not None
    return last


@pytest.fixture
def run_copy(tiny_run, tmp_path) -> Path:
    """That run, to change."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def folder_copy(folder, tmp_path) -> Path:
    """That model folder, to change."""
    return shutil.copytree(folder, tmp_path / folder.name)


@pytest.fixture(scope="session", autouse=True)
def decode_in_float32():
    """On GPUs, too, unless a test says otherwise: texts are only claimed to be equal there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "GPU_DTYPE", "float32")
        yield


@pytest.fixture(scope="session", autouse=True)
def empty_loss_curves():
    """Pictures of runs in this process are painted and then cleared: what takes longer than
    training a tiny model is to set their letters. Those of other processes are whole."""

    def draw(out, paint, **options):
        pictures.draw(out, lambda fig: (paint(fig), fig.clear()), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "draw", draw)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
