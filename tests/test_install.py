"""`make` on machines that lack something: one line that says what to do, and the next attempt goes
on rightly."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import python

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_CONSTRAINT": "",
}
UNREACHABLE = {**OFFLINE, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
NO_WHEELS = {**OFFLINE, "PIP_NO_INDEX": "1"}


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What set-up needs of this checkout: a project so small that only its build needs an index."""
    for name in ("Makefile", "tools/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "1"\ndependencies = ["mlx==0.32.4"]\n'
    )
    (tmp_path / "setup.py").write_text("from setuptools import setup\nsetup(packages=[])\n")
    (tmp_path / "constraints.txt").touch()
    return tmp_path


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """The whole PATH: what set-up needs of this machine, so no uv."""
    (tmp_path / "bin").mkdir()
    for name in ("make", "sh", "test", "rm", "touch"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


@pytest.fixture
def make(checkout, path):
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs these tests
    inherited = {k: v for k, v in os.environ.items() if k not in outer}

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        argv = ["make", "train", f"PYTHON={sys.executable}", *args]
        return subprocess.run(
            argv, cwd=checkout, env={**inherited, **env}, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip

    return run


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error; what make itself adds to it is make's."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def tool(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


@pytest.mark.parametrize("command", ["", "python-that-is-not-there", "old"])
def test_no_python(make, path, command):
    tool(path, "old", "exit 1")  # as its comparison of versions ends
    assert "no Python 3.11 or newer found; install one, or: make PYTHON=" in refusal(
        make(f"PYTHON={command}")
    )


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_no_module_to_make_environments_with(make, checkout, path, module):
    hide = (
        "import importlib.util as u, runpy, sys; find = u.find_spec; u.find_spec = lambda name, "
        f"*a: None if name == '{module}' else find(name, *a); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    tool(path, "lacking", f'[ "$1" = -c ] && exit 0\nexec {sys.executable} -c "{hide}" "$@"')
    assert "sudo apt-get install python3-venv" in refusal(make("PYTHON=lacking"))
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_no_network_and_no_wheel_and_then_on(make, checkout):
    done = make(**UNREACHABLE)
    assert done.stdout.startswith("installing into .venv: ")
    assert "the package index cannot be reached; check the network" in refusal(done)
    made = (checkout / ".venv" / "pyvenv.cfg").stat()
    assert "the package index has no setuptools" in refusal(make(**NO_WHEELS))
    assert (checkout / ".venv" / "pyvenv.cfg").stat() == made  # nothing was thrown away
    assert not list((checkout / ".venv").glob(".core"))


@pytest.mark.slow
@pytest.mark.parametrize("state", ["killed", "python is gone", "another machine's", "empty"])
def test_a_half_made_environment_is_made_anew(make, checkout, state):
    venv = checkout / ".venv"
    if state != "empty":
        subprocess.run(python("-m", "venv", "--without-pip", str(venv)), check=True)
        (venv / ".core").touch()
        (venv / "half-a-package").touch()
    if state == "killed":
        (venv / ".installing").touch()
    elif state == "another machine's":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").write_text("no program")
        (venv / "bin" / "python").chmod(0o755)
    elif state == "python is gone":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to("/nowhere/python3")
    else:
        venv.mkdir()
    done = make(**NO_WHEELS)
    assert ".venv is not whole; making it again" in done.stdout
    assert "the package index has no setuptools" in refusal(done)
    assert not (venv / "half-a-package").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_another_folder_of_that_name_is_left_alone(make, checkout, kind):
    if kind == "folder":
        (checkout / ".venv").mkdir()
        (checkout / ".venv" / "letters.txt").write_text("mine")
    else:
        (checkout / ".venv").write_text("mine")
    assert "is no virtual environment; remove it, or name another folder" in refusal(
        make(**NO_WHEELS)
    )
    assert (checkout / ".venv").exists()


def test_a_checkout_that_cannot_be_written(make, monkeypatch, checkout):
    """Root may write anywhere, so the question is answered for it."""
    script = checkout / "tools" / "install.py"
    script.write_text(script.read_text().replace("os.access(folder, os.W_OK)", "False"))
    assert "cannot be written; clone to where you may write" in refusal(make())
    assert not (checkout / ".venv").exists()


def test_uv_is_used_where_it_is(make, checkout, path):
    tool(path, "uv", f'echo "$@" >> {checkout}/asked\necho "Installed 3 packages in 5ms"')
    done = make()
    assert "; with uv" in done.stdout and "  Installed 3 packages in 5ms" in done.stdout
    assert (
        (checkout / "asked")
        .read_text()
        .startswith("pip install -c constraints.txt -e . --python .venv/bin/python")
    )
    assert (checkout / ".venv" / ".core").exists()
    assert "ModuleNotFoundError" in done.stderr  # the job itself was begun


@pytest.mark.slow
def test_pip_is_used_where_uv_fails(make, path):
    tool(path, "uv", "echo 'error: Failed to fetch: dns error'; exit 2")
    done = make(**NO_WHEELS)
    assert "  uv: the package index cannot be reached; check the network" in done.stdout
    assert "; trying pip" in done.stdout and "the package index has no setuptools" in refusal(done)


def test_set_up_runs_again_only_when_its_files_change(make, checkout, path):
    tool(path, "uv", f"echo asked >> {checkout}/asked")
    for expected in (1, 1):
        make()
        assert (checkout / "asked").read_text().count("asked") == expected
    os.utime(checkout / "constraints.txt")
    make()
    assert (checkout / "asked").read_text().count("asked") == 2


def test_extras_that_the_project_does_not_have_and_wrong_arguments(checkout):
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("[project.optional-dependencies]\ndev = []\n")
    for arguments, message in (
        ([".venv", "dev,torhc"], "no extras torhc; known: dev"),
        ([], "usage: python tools/install.py FOLDER"),
        (["--help"], "usage: python tools/install.py FOLDER"),
    ):
        argv = [sys.executable, "tools/install.py", *arguments]
        done = subprocess.run(argv, cwd=checkout, capture_output=True, text=True, check=False)
        assert message in refusal(done)
    assert not (checkout / ".venv").exists()


def test_other_extras_are_installed_when_asked_for_by_name(checkout, path, make):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    tool(checkout / ".venv" / "bin", "python", "exit 0")
    for asked, installs in (
        (["EXTRAS=dev"], False),
        ([], False),
        (["EXTRAS=dev,torch"], True),
    ):
        (checkout / ".venv" / ".dev").write_text("dev\n")
        done = make("-n", "setup", *asked)
        assert ('tools/install.py .venv "' in done.stdout) == installs, done
