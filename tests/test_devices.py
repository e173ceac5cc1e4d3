"""Everything runs on the device that was asked for: also a Mac's CPU, which stands beside a GPU."""

import contextlib
import importlib

import mlx.core as mx
import numpy as np
import pytest
from helpers import BASE, objects, refused
from mlx_lm.generate import generate_step, speculative_generate_step

from mlx_mla import serve
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import LIMIT, MLXBackend
from mlx_mla.model import model_mlx
from mlx_mla.model.weights import initial_weights

GIB = 2**30


def session():
    return MLXBackend("cpu").train_session(BASE, Start(initial_weights(BASE.model, 0)))


@pytest.fixture
def a_mac(monkeypatch):
    """MLX's answers on a Mac whose CPU is in use: Metal is there, but the CPU has no working set
    that could be wired."""
    said = dict(mx.device_info(mx.Device(mx.cpu)))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(
        mx, "device_info", lambda d=mx.cpu: {**said, LIMIT: 8 * GIB} if d == mx.gpu else said
    )

    def wire(limit):
        raise AssertionError("wired memory, and the CPU in use")

    monkeypatch.setattr(mx, "set_wired_limit", wire)


@pytest.fixture
def foreign_stream(monkeypatch):
    """mlx-lm's own stream, bound to another device than ours when it was imported: whoever computes
    on it fails."""
    for loop in (generate_step, speculative_generate_step):
        monkeypatch.setattr(loop, "__defaults__", ("mlx-lm's own stream",))
    module = importlib.import_module("mlx_lm.generate")
    monkeypatch.setattr(module, "generation_stream", "mlx-lm's own stream")


@pytest.mark.usefixtures("a_mac")
def test_the_cpu_of_a_mac_wires_no_memory(folder, capfd):
    with MLXBackend("cpu").limited_memory(GIB):
        loss = session().step(0, 1e-3, [(np.zeros((1, 8), np.int32),) * 2]).loss
    assert loss == pytest.approx(np.log(BASE.model.vocab_size), rel=0.1)
    argv = ("--model", folder, "--prompt", "The st", "--max-tokens", "4", "--device", "cpu")
    assert objects(capfd, *argv)[0]["tokens"] == 4


@pytest.mark.usefixtures("a_mac")
def test_the_gpu_of_a_mac_wires_its_working_set(monkeypatch):
    limits = {"wired": 1, "cache": 2}

    def setter(name):
        def set_limit(value):
            before, limits[name] = limits[name], value
            return before

        return set_limit

    monkeypatch.setattr(mx, "set_wired_limit", setter("wired"))
    monkeypatch.setattr(mx, "set_cache_limit", setter("cache"))
    backend = MLXBackend("cpu")
    backend.device = mx.Device(mx.gpu)
    with backend.limited_memory(3 * GIB):
        assert limits == {"wired": 8 * GIB, "cache": 5 * GIB}
    assert limits == {"wired": 1, "cache": 2}


@pytest.mark.usefixtures("foreign_stream")
@pytest.mark.parametrize(
    "flags",
    [
        ("--prompt", "The st"),
        ("--prompt", "The st", "--max-kv-size", "8"),
        ("--prompts-file", "FILE"),
        ("--prompt", "The st", "--draft-model", "FOLDER"),
    ],
    ids=["one", "overflow", "batch", "draft"],
)
def test_decoding_stays_on_its_device(folder, tmp_path, capfd, flags):
    file = tmp_path / "prompts.txt"
    file.write_text("The st\nA longer prompt\n")
    named = {"FILE": file, "FOLDER": folder}
    flags = [named.get(f, f) for f in flags]
    said = objects(capfd, "--model", folder, "--max-tokens", "6", "--device", "cpu", *flags)
    assert all(answer["tokens"] == 6 for answer in said)


@pytest.mark.usefixtures("foreign_stream")
def test_samples_while_training_stay_on_their_device():
    assert len(session().generate([1, 2, 3], 5, 0.0, 0)) == 5


def test_each_backend_has_the_device_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(mx, "is_available", lambda _: True)
    before = mx.default_device()
    devices = [get_backend("mlx", name).device for name in ("auto", "cpu", "auto", "gpu")]
    assert devices == [mx.gpu, mx.cpu, mx.gpu, mx.gpu]
    assert mx.default_device() == before


def test_fused_kernels_are_not_for_the_cpu_of_a_mac(monkeypatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert model_mlx.on_metal()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not model_mlx.on_metal()


def test_serve_generates_on_its_device(folder, monkeypatch, capsys):
    """The generation thread takes MLX's default, in which the server runs until it ends."""
    current, during = [], []

    class Ends:
        def __init__(self, provider):
            during.append(*current)
            provider.loaded.set()

        def stop_and_join(self):
            pass

    @contextlib.contextmanager
    def stream(chosen):
        current.append(chosen)
        yield
        current.pop()

    monkeypatch.setattr(mx, "stream", stream)
    monkeypatch.setattr(serve, "Generator", Ends)
    monkeypatch.setattr(serve.Server, "serve_forever", lambda _: None)
    monkeypatch.setattr(mx, "is_available", lambda _: True)
    for name in ("gpu", "cpu"):
        assert serve.main(["--model", str(folder), f"--device={name}"]) == 0
    assert during == [mx.gpu, mx.cpu]
    assert "--device: invalid choice" in refused(capsys, "--device", "tpu", command=serve.main)
