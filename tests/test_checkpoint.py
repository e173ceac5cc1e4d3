"""Checkpoints are complete or absent, and damage is noticed."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
from helpers import refused
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert import __main__ as convert
from mlx_mla import checkpoint, files, generate, hub
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import not_finite


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "step-1"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert set(contents(target)) == {"a", "SHA256SUMS"}

    with pytest.raises(RuntimeError), files.atomic_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError("killed in the middle")
    assert contents(target)["a"] == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]

    with files.atomic_folder(target) as folder:
        (folder / "b").write_text("3")
    assert set(contents(target)) == {"b", "SHA256SUMS"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_what_is_downloaded_from_the_hub_is_whole(tiny_run, tmp_path):
    """The patterns of files take all that SHA256SUMS names beside the training state."""
    chat = ModelFolder(checkpoint.latest(tiny_run)).tokenizer
    chat.chat_template = "{{ messages }}"
    with files.atomic_folder(tmp_path / "chat") as folder:
        shutil.copytree(checkpoint.latest(tiny_run), folder, dirs_exist_ok=True)
        (folder / checkpoint.SUMS).unlink()
        chat.save_pretrained(str(folder))
    names = [p.name for p in (tmp_path / "chat").iterdir()]
    (tmp_path / "copy").mkdir()
    for name in filter_repo_objects(
        names, allow_patterns=list(hub.FILES), ignore_patterns=list(hub.TRAINING)
    ):
        shutil.copy(tmp_path / "chat" / name, tmp_path / "copy")
    assert checkpoint.integrity_error(tmp_path / "copy", training=False) is None
    there = {p.name for p in (tmp_path / "copy").iterdir()}
    assert {"configuration_mla_gpt2.py", "chat_template.jinja"} <= there
    assert not there & {checkpoint.STATE, checkpoint.STATE_INFO}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("403 Client Error.\n\na/b is restricted."),
            "is restricted.)",
        ),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "(JSONDecodeError: Expecting value"),
        (OSError(28, "No space left on device"), "No space left on device); for a gated"),
    ],
)
def test_whatever_fails_in_a_download_is_one_line(monkeypatch, capsys, error, said):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fails)
    generated = refused(capsys, "--model", "a/b", "--prompt", "x", command=generate.main)
    converted = refused(capsys, "a/b", "--out", "none", command=convert.main)
    assert generated == converted and said in generated


def test_a_damaged_download_says_how_to_remove_it(tiny_run, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(checkpoint.latest(tiny_run), tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"short")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(copy))
    said = refused(capsys, "--model", "a/b", "--prompt", "x", command=generate.main)
    assert "remove it with: hf cache rm model/a/b" in said


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum on this system")
def test_sums_are_what_sha256sum_reads(tiny_run):
    folder = checkpoint.latest(tiny_run)
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == len(contents(folder)) - 2  # all but itself and the README


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_flipped_bit_or_a_lost_tail_is_found(tiny_run, tmp_path, data):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint.latest(tiny_run), folder)
    assert checkpoint.integrity_error(folder) is None
    names = ["model.safetensors", "train_state.safetensors", "config.json", "tokenizer.json"]
    name = data.draw(st.sampled_from(names))
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(content) * 8 - 1))
        content[at // 8] ^= 1 << (at % 8)
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / name).write_bytes(content)
    changed = f"{name} is truncated or changed (its sha256 differs)"
    assert checkpoint.integrity_error(folder) == changed
    # Only resuming reads the training state.
    sound = checkpoint.integrity_error(folder, training=False) is None
    assert sound == name.startswith("train_state")
    (folder / name).unlink()
    assert checkpoint.integrity_error(folder) == f"{name} is missing"


def test_a_list_of_checksums_that_was_cut_is_no_proof(folder_copy):
    path = folder_copy / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    for end in range(len(lines)):
        path.write_text("".join(lines[:end]))
        assert "SHA256SUMS is truncated" in checkpoint.integrity_error(folder_copy), end
    path.write_bytes(b"\xff" * 100)
    assert "SHA256SUMS: not UTF-8 text" in checkpoint.integrity_error(folder_copy)
    path.write_text("".join(lines) + "0" * 64 + "  ../../../etc/hostname\n")
    assert "is not a checksum and a name" in checkpoint.integrity_error(folder_copy)
    path.write_text("".join([*lines, "0" * 64 + lines[0][64:]]))
    repeated = f"line {len(lines) + 1}: repeats {lines[0][66:-1]}"
    assert repeated in checkpoint.integrity_error(folder_copy)
    path.unlink()
    path.symlink_to("nowhere")
    assert "SHA256SUMS: no such file" in checkpoint.integrity_error(folder_copy)
    path.unlink()
    path.write_text("".join(lines))
    (folder_copy / "notes.txt").write_text("of the user's own")
    assert checkpoint.integrity_error(folder_copy) is None


def test_values_that_are_not_finite_are_found_wherever_they_are(rng):
    weights = {"a": np.full((3, 5), 3e38, np.float32), "b": np.zeros((4, 1000), np.float32)}
    assert not_finite(weights) is None  # the sum of the first overflows
    for value in (np.nan, np.inf, -np.inf):
        damaged = weights["b"].copy()
        damaged[rng.integers(4), rng.integers(1000)] = value
        assert not_finite({**weights, "b": damaged}) == "b"
    both = weights["b"].copy()
    both[0, :2] = np.inf, -np.inf
    assert not_finite({"b": both}) == "b"


STATE = {"format": 1, "step": 40, "val_loss": 2.5}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (STATE | {"step": 0}, "step 0 is not that of step-000040"),
        (STATE | {"step": 10**400}, "step must be a number of at most 64 bits, not 1000"),
        (STATE | {"step": True}, "step = True is not a value of type int"),
        (STATE | {"val_loss": 10**400}, "val_loss must be a number of at most 64 bits"),
        (STATE | {"val_loss": float("inf")}, "val_loss must be a finite number, not inf"),
        (STATE | {"data_sha256": ["x"]}, "data_sha256 = ['x'] is not a value of type str"),
        ({"format": 1, "step": 40}, "val_loss is missing"),
        ({"format": 10**400}, "format 1000"),
        (STATE | {"format": 2}, "format 2, and this version reads 1"),
    ],
)
def test_a_training_state_that_no_run_writes_is_refused(folder_copy, values, problem):
    (folder_copy / checkpoint.STATE_INFO).write_text(json.dumps(values))
    with pytest.raises(UserError) as raised:
        checkpoint.read_train_state(
            folder_copy, TrainConfig(model=checkpoint.ModelFolder(folder_copy).config)
        )
    assert str(raised.value).startswith(f"{folder_copy / checkpoint.STATE_INFO}: {problem}")


def test_optimizer_state_of_another_shape_names_the_file_and_both_shapes(folder_copy):
    config = TrainConfig(model=checkpoint.ModelFolder(folder_copy).config)
    state, _ = checkpoint.read_train_state(folder_copy, config)
    key = "exp_avg_sq.transformer.ln_f.bias"
    save_file(state | {key: np.zeros(7, np.float32)}, folder_copy / checkpoint.STATE)
    with pytest.raises(UserError) as raised:
        checkpoint.read_train_state(folder_copy, config)
    said = str(raised.value)
    assert said.startswith(f"{folder_copy / checkpoint.STATE}: the optimizer state does not fit")
    assert f"tensor {key} has shape (7,), and the model needs (32,)" in said
    save_file({k: v for k, v in state.items() if k != key}, folder_copy / checkpoint.STATE)
    with pytest.raises(UserError, match=r"ln_f\.bias is missing, and the model needs \(32,\)"):
        checkpoint.read_train_state(folder_copy, config)
    save_file(state, folder_copy / checkpoint.STATE)
    with pytest.raises(UserError, match=r"momentum_buffer\.\S+ is missing"):
        checkpoint.read_train_state(folder_copy, dataclasses.replace(config, optimizer="muon"))


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_models_with_weights_that_are_not_finite_are_refused(folder_copy, backend):
    from mlx_mla.backends import get_backend

    weights = checkpoint.ModelFolder(folder_copy).weights()
    weights["transformer.ln_f.bias"][3] = np.nan
    save_file(weights, folder_copy / "model.safetensors", {"format": "mlx"})
    for load in (get_backend(backend, "cpu").decoder, get_backend(backend, "cpu").scorer):
        with pytest.raises(UserError, match=r"transformer\.ln_f\.bias has values that are not"):
            load(checkpoint.ModelFolder(folder_copy))


@pytest.mark.parametrize(
    "text",
    ["../../elsewhere", "..", "", "step-000020-backup", "x" * 10_000, "step-000999\n", None],
)
def test_latest_never_leads_out_of_the_run_nor_to_what_is_not_there(run_copy, text):
    """Killed between renaming a checkpoint and noting it, a run has none or another's."""
    shutil.copytree(run_copy / "checkpoints" / "step-000020", run_copy.parent / "elsewhere")
    (run_copy / "latest").unlink()
    if text is not None:
        (run_copy / "latest").write_text(text)
    assert checkpoint.latest(run_copy) == run_copy / "checkpoints" / "step-000040"


def test_weights_come_back_bit_for_bit(tiny_run):
    folder = checkpoint.latest(tiny_run)
    config = checkpoint.ModelFolder(folder).config
    weights = checkpoint.ModelFolder(folder).weights(config)
    state, info = checkpoint.read_train_state(folder, TrainConfig(model=config))
    assert {k.split(".", 1)[0] for k in state} == {"exp_avg", "exp_avg_sq"}
    assert len(state) == 2 * len(weights)
    assert info.step == 40

    from mlx_mla.data.tokenizer import ByteTokenizer

    with files.atomic_folder(folder.parent / "copy") as copy:
        checkpoint.write_model(copy, config, weights, ByteTokenizer().fast_tokenizer(), "card")
    again = checkpoint.ModelFolder(folder.parent / "copy").weights(config)
    shutil.rmtree(folder.parent / "copy")
    for name, w in weights.items():
        np.testing.assert_array_equal(w.view(np.uint32), again[name].view(np.uint32))


def test_tensors_that_do_not_fit_are_named(folder_copy):
    config = checkpoint.ModelFolder(folder_copy).config
    wider = ModelConfig(**{**config.to_dict(), "n_inner": 64}).resolved()
    with pytest.raises(UserError, match=r"mlp\.c_.* has shape .* the configuration requires"):
        checkpoint.ModelFolder(folder_copy).weights(wider)
    deeper = ModelConfig(**{**config.to_dict(), "n_layer": 3}).resolved()
    with pytest.raises(UserError, match=r"missing tensors transformer\.h\.2\..* and \d+ more"):
        checkpoint.ModelFolder(folder_copy).weights(deeper)
    path = folder_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="may be truncated"):
        checkpoint.ModelFolder(folder_copy).weights(config)


def test_pruning_keeps_the_newest_and_clears_leftovers(tmp_path):
    folder = tmp_path / "checkpoints"
    kept = ["step-000005", "step-000010", "step-1000000"]
    for name in (*kept, ".step-000015.tmp-1", ".step-000005.old-1"):
        (folder / name).mkdir(parents=True)
    checkpoint.prune(tmp_path, 0, newest=10)
    assert sorted(p.name for p in folder.iterdir()) == kept
    # Resumed from an earlier step: what comes later does not count.
    checkpoint.prune(tmp_path, 1, newest=10)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000010", "step-1000000"]
    (folder / "step-000005").mkdir()
    checkpoint.prune(tmp_path, 2, newest=1000000)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000010", "step-1000000"]


def test_model_folder_of_a_path(tiny_run, tmp_path):
    newest = tiny_run / "checkpoints" / "step-000040"
    assert checkpoint.model_folder(tiny_run) == newest
    assert checkpoint.model_folder(newest) == newest
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, message in (
        (tmp_path / "nothing", "no such model folder"),
        (tmp_path, "no config.json"),
        (tmp_path / "run", "no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.model_folder(path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no weights"):
        checkpoint.model_folder(tmp_path)


def test_config_json_has_what_other_tools_look_for(tiny_run):
    values = json.loads((checkpoint.latest(tiny_run) / "config.json").read_text())
    assert values["model_type"] == "mla_gpt2"
    assert values["model_file"] == "model_mlx.py"
    assert values["num_hidden_layers"] == values["n_layer"] == 2
