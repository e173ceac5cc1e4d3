"""The PyTorch backend against the MLX backend: same losses, same folders, same text."""

import dataclasses
import shutil

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from helpers import BASE, TINY, batch, edit, objects, refused, tiny_train, words

from mlx_mla import generate, train
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start
from mlx_mla.data.corpus import read_documents, tokenize
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.data.windows import TokenWindows
from mlx_mla.errors import UserError
from mlx_mla.model.presets import preset
from mlx_mla.model.schedule import learning_rate
from mlx_mla.model.weights import initial_weights
from mlx_mla.training.metrics import read_metrics


def sessions(config):
    weights = initial_weights(config.model, config.seed, config.initializer_range)
    return [get_backend(name).train_session(config, Start(weights)) for name in ("mlx", "torch")]


@pytest.mark.slow
def test_loss_curves_agree_over_50_steps_of_nano():
    config = dataclasses.replace(preset("nano").resolved(), compile=False)
    tokens = tokenize(read_documents("builtin"), ByteTokenizer())
    data = TokenWindows(tokens, config.context, config.seed, 257)
    mlx, torch_ = sessions(config)
    for step in range(50):
        lr, batches = learning_rate(config, step), [data.batch(step, config.batch_size)]
        a, b = (s.step(step, lr, batches) for s in (mlx, torch_))
        assert a.loss == pytest.approx(b.loss, abs=1e-3), f"step {step}"
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)


@pytest.mark.parametrize(
    "changes", [{}, {"grad_clip": 0.0}, {"model": {"attention": "mha", "qk_rope_head_dim": 0}}]
)
def test_weights_and_moments_agree_after_some_steps(changes):
    changes = dict(changes)
    model = dataclasses.replace(BASE.model, **changes.pop("model", {}))
    config = dataclasses.replace(BASE, model=model, **changes)
    mlx, torch_ = sessions(config)
    for step in range(4):
        batches = [batch(2 * step, 2), batch(2 * step + 1, 2)]  # accumulated
        for s in (mlx, torch_):
            s.step(step, 1e-2, batches)
    assert mlx.loss_sum(batch(9)) == pytest.approx(torch_.loss_sum(batch(9)), rel=1e-4)
    for a, b in (
        (mlx.weights(), torch_.weights()),
        (mlx.optimizer_state(), torch_.optimizer_state()),
    ):
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith("c_attn.bias"):
                # Softmax cancels the key bias: its gradient is noise, which Adam blows up to whole
                # steps.
                keys = slice(model.n_embd, 2 * model.n_embd)
                a[name][keys] = b[name][keys] = 0
            np.testing.assert_allclose(a[name], b[name], atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("first", "second"),
    [("mlx", "torch"), pytest.param("torch", "mlx", marks=pytest.mark.slow)],
)
def test_a_run_begun_in_one_backend_goes_on_in_the_other(tmp_path, text_file, first, second):
    def run(out, *flags):
        tiny_train(out, "--data", text_file, "--log-every", "1", *flags)
        return [r["loss"] for r in read_metrics(out / "metrics.jsonl") if r["split"] == "train"]

    expected = run(tmp_path / "straight", "--steps", "16", "--backend", first)
    run(tmp_path / "mixed", "--steps", "16", "--save-every", "8", "--backend", first)
    shutil.rmtree(tmp_path / "mixed" / "checkpoints" / "step-000016")
    got = run(tmp_path / "mixed", "--steps", "16", "--backend", second, "--resume")
    assert got == pytest.approx(expected, abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="not promised there: docs/reliability.md")
def test_resuming_is_bit_identical(tmp_path, text_file):
    flags = words(*TINY, "--data", text_file, "--backend torch --dropout 0.1 --save-every 4")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main([*flags, "--out", str(straight), "--steps", "8"]) == 0
    assert train.main([*flags, "--out", str(stopped), "--steps", "8"]) == 0
    shutil.rmtree(stopped / "checkpoints" / "step-000008")
    assert train.main(["--resume", "--out", str(stopped)]) == 0
    for name in ("model.safetensors", "train_state.safetensors", "train_state.json"):
        a, b = (
            (run / "checkpoints" / "step-000008" / name).read_bytes() for run in (straight, stopped)
        )
        assert a == b, name


def test_bfloat16_learns_with_float32_weights():
    config = dataclasses.replace(BASE, dtype="bfloat16")
    session = get_backend("torch").train_session(
        config, Start(initial_weights(config.model, 0, 0.1))
    )
    losses = [session.step(step, 1e-2, [batch(0)]).loss for step in range(15)]
    assert losses[-1] < losses[0] - 0.5
    assert {w.dtype for w in session.weights().values()} == {np.dtype(np.float32)}


def test_caches_have_the_promised_sizes(tiny_run, capfd):
    argv = words(
        "--model", tiny_run, "--prompt", "The st", "--max-tokens 10 --backend torch --cache"
    )
    sizes = {
        cache: objects(capfd, *argv, cache)[0]["kv_cache_bytes"]
        for cache in ("latent", "materialized", "none")
    }
    tokens, layers = 6 + 9, 2  # the last token is never read
    assert sizes["latent"] == tokens * layers * (16 + 8) * 4
    assert sizes["materialized"] == tokens * layers * (2 * (16 + 8) + 2 * 16) * 4
    assert sizes["none"] == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", "100", "--max-kv-size", "48"),
        ("--stop", "e", "th"),
        ("--repetition-penalty", "1.5", "--repetition-context-size", "10", "--max-tokens", "20"),
    ],
)
def test_options_mean_what_they_mean_in_mlx(tiny_run, capfd, options):
    argv = ("--model", tiny_run, "--prompt", "The st", "--temp", "0", *options)
    (mlx,), (torch_,) = (objects(capfd, *argv, "--backend", name) for name in ("mlx", "torch"))
    assert mlx["text"] == torch_["text"]


def test_bad_input_gets_one_line(tiny_run, folder_copy, capsys):
    argv = ("--model", tiny_run, "--prompt", "x", "--backend", "torch")
    assert "--kv-bits works only with --backend mlx" in refused(
        capsys, *argv, "--kv-bits 8", command=generate.main
    )
    if not torch.cuda.is_available():
        said = refused(capsys, *argv, "--device", "cuda", command=generate.main)
        assert "--device cuda: PyTorch has" in said
        assert "cpu here" in said
    said = refused(capsys, "--model", tiny_run, "--prompt x --device mps", command=generate.main)
    assert "requires --backend torch" in said

    (folder_copy / "SHA256SUMS").unlink()
    edit(folder_copy / "config.json", quantization={"bits": 4, "group_size": 32})
    argv = ("--model", folder_copy, "--prompt", "x", "--backend", "torch")
    assert "which only MLX reads" in refused(capsys, *argv, command=generate.main)


def test_a_missing_framework_is_named(monkeypatch):
    import sys

    import mlx_mla.backends.torch

    # Importing the package anew puts another one into its parent, too.
    monkeypatch.setattr(mlx_mla.backends, "torch", mlx_mla.backends.torch)
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [
        n
        for n in sys.modules
        if n.startswith("mlx_mla.backends.torch") or n == "mlx_mla.model.model_torch"
    ]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        UserError, match="--backend torch: torch is not installed; pip install torch"
    ):
        get_backend("torch")


def test_the_growing_cache_holds_what_transformers_does_and_is_not_copied():
    from transformers import DynamicCache

    from mlx_mla.backends.torch.caches import GrowingCache

    ours, theirs = GrowingCache(), DynamicCache()
    for length in (250, 1, 5, 1, 300, 1):
        states = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 0)
        place = ours.layers[0].keys.data_ptr() if ours.layers else None
        room = 256 * -(-ours.get_seq_length() // 256)
        for got, expected in zip(ours.update(*states, 0), theirs.update(*states, 0)):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if place and ours.get_seq_length() <= room:
            assert ours.layers[0].keys.data_ptr() == place
