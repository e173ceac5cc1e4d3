"""Two commands never write into one place, a killed one is in nobody's way, and files are as the
umask has them."""

import json
import os
import platform
import shutil
import signal
import stat
import subprocess

import numpy as np
import pytest
from helpers import TINY, python, refused, tiny_train

from mlx_mla import checkpoint, evaluate, files, prepare
from mlx_mla.errors import UserError
from mlx_mla.files import atomic_folder
from mlx_mla.locks import locked
from mlx_mla.training.run_folder import locked_run

HOLD = (
    "import sys, time; from pathlib import Path; from mlx_mla.locks import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


def contents(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_who_holds_a_lock_is_named_and_a_kill_frees_it(tmp_path):
    target = tmp_path / "results.json"
    with subprocess.Popen(python("-c", HOLD, str(target)), stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError) as told, locked(target):
            pass
        assert f"process {holder.pid} on {platform.node()}" in str(told.value)
        assert "from mlx_mla.locks import" not in str(told.value)  # cut: it is a whole program
        holder.send_signal(signal.SIGKILL)
    (tmp_path / ".results.json.tmp-4711").write_text("left by the killed process")
    with locked(target):
        assert [p.name for p in tmp_path.iterdir()] == [".results.json.lock"]
        (who,) = (json.loads(p.read_text()) for p in tmp_path.iterdir())
        assert who["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_an_error_releases_the_lock(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path, inside=True):
        raise RuntimeError
    with locked(tmp_path, inside=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_what_was_not_written_go_again(tmp_path):
    target = tmp_path / "a" / "b" / "c"
    with pytest.raises(RuntimeError), locked(target):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with locked(target):
        target.write_text("")
    assert target.is_file()


def test_a_link_to_a_folder_stays_one(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with locked(link), atomic_folder(link) as folder:
        (folder / "file").write_text("new")
    assert link.is_symlink() and (real / "file").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"), locked(tmp_path / "file" / "x"):
        pass


def test_every_command_refuses_what_another_writes(run_copy, tmp_path, text_file, capsys):
    before = contents(run_copy)
    me = f"process {os.getpid()} on"
    with locked(run_copy, inside=True):
        for argv in (("--resume", "--steps", "45"), ("--auto-resume", "--steps", "45")):
            assert me in refused(capsys, *argv, "--out", run_copy)
    assert contents(run_copy) == before
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty", inside=True):
        assert me in refused(capsys, *TINY, "--data", text_file, "--out", tmp_path / "empty")
        argv = (text_file, "--out", tmp_path / "empty", "--tokenizer", "bytes")
        assert me in refused(capsys, *argv, command=prepare.main)
    with locked(tmp_path / "r.json"):
        argv = ("--model", run_copy, "--tasks", "speed", "--out", tmp_path / "r.json")
        assert me in refused(capsys, *argv, command=evaluate.main)


def test_what_killed_processes_left_is_cleared_and_a_replaced_checkpoint_is_put_back(run_copy):
    kept = contents(run_copy)
    folder = run_copy / "checkpoints"
    # Killed between the two renames by which a checkpoint is replaced.
    os.rename(folder / "step-000040", folder / ".step-000040.old-77")
    shutil.copytree(folder / "step-000020", folder / ".step-000040.tmp-77")
    shutil.copytree(folder / "step-000020", folder / ".step-000020.old-77")
    for name in (".config.toml.tmp-77", ".latest.tmp-77", ".loss.png.tmp-0123456789abcdef"):
        (run_copy / name).write_text("half")
    (run_copy / ".mine.tmp-1").write_text("of somebody else")
    with locked_run(run_copy):
        pass
    assert (run_copy / ".mine.tmp-1").exists()
    (run_copy / ".mine.tmp-1").unlink()
    assert contents(run_copy) == kept


def test_a_run_killed_as_it_made_its_folder_starts_again(tmp_path, text_file):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.toml.tmp-4711").write_text("steps = ")
    (out / ".lock").write_text("")
    tiny_train(out, "--data", text_file, "--steps", "1", "--auto-resume")
    assert checkpoint.latest(out) is not None
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_and_folders_have_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a.json", "{}")
        with files.atomic_folder(tmp_path / "model") as folder:
            checkpoint.write_train_state(folder, {"exp_avg.x": np.zeros(3, np.float32)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask
    for path in (tmp_path / "a.json", *(tmp_path / "model").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_temporary_names_are_new_each_time_and_lead_nowhere_else(tmp_path, monkeypatch):
    seen = set()
    for _ in range(3):
        with files.atomic_file(tmp_path / "a"):
            seen |= {p.name for p in tmp_path.iterdir() if p.name.startswith(".")}
    assert len(seen) == 3
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "known")
    (tmp_path / ".a.tmp-known").symlink_to(victim)
    with pytest.raises(UserError, match="could not be written: File exists"):
        files.write_text(tmp_path / "a", "other")
    assert victim.read_text() == "mine"
