"""Make the environment of the Makefile's commands: `python tools/install.py VENV [EXTRAS]`.

Prints the size of the download, shows progress, and continues where an earlier attempt ended. Uses
uv if that is on the PATH, else pip. A failure ends in one line with what to do, and exit code 2.
Needs only Python 3.11.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZE = "160 MB to download, 750 MB on disk; with PyTorch for the CPU 470 MB and 2.1 GB"
SHOWN = (
    r"Downloading .*\((\d{2,}|[\d.]+ ?G)|Installing collected|(Resolved|Prepared|Installed) \d+ "
)
"""Lines of an installer that are worth showing: large downloads and the last part."""
NETWORK = (
    "NewConnectionError|[Nn]ame resolution|NameResolution|Name or service|unreachable|refused|"
    "Timeout|timed out|ProxyError|SSLError|dns error|error sending request|Connection reset"
)
NO_PIP = (
    "cannot make virtual environments with pip (no venv or ensurepip module); install it (Debian "
    "and Ubuntu: sudo apt-get install python3-venv), or uv, or name another Python: make "
    "PYTHON=/path/to/python3"
)


def main(argv: list[str]) -> int:
    try:
        if len(argv) not in (1, 2) or argv[0].startswith("-"):
            raise RuntimeError("usage: python tools/install.py FOLDER [EXTRA,EXTRA...]")
        install(Path(argv[0]), _known(argv[1]) if len(argv) > 1 else "")
    except RuntimeError as e:  # what went wrong, and what to do about it
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next make starts this set-up again", file=sys.stderr)
        return 130
    return 0


def _known(extras: str) -> str:
    """The extras, without spaces; pip and uv install nothing for one that they do not know."""
    names = extras.replace(" ", "").split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project.get("optional-dependencies", {})
    if unknown := [name for name in names if name not in known]:
        raise RuntimeError(f"no extras {', '.join(unknown)}; known: {', '.join(known)}")
    return ",".join(names)


def install(venv: Path, extras: str) -> None:
    """Make the environment if it is not whole, and install this project with its extras into it."""
    for folder in (ROOT, venv.parent):
        if not os.access(folder, os.W_OK):
            raise RuntimeError(
                f"{folder.resolve()} cannot be written; clone to where you may write"
            )
    begun, uv, unfinished = time.monotonic(), shutil.which("uv"), venv / ".installing"
    print(f"installing into {venv}: {SIZE}; with {'uv' if uv else 'pip'}", flush=True)
    if venv.exists() and (unfinished.exists() or not _runs(venv, "-c", "pass")):
        _remove(venv)
    if not venv.exists():
        _make(venv, unfinished, with_pip=uv is None)
    unfinished.touch()
    python, log = str(venv / "bin" / "python"), venv / "install.log"
    common = ["install", "-c", "constraints.txt", "-e", f".[{extras}]" if extras else "."]
    failed = _run([uv, "pip", *common, "--python", python], log) if uv else "no uv"
    if uv and failed:
        print(f"  uv: {failed}; trying pip", flush=True)
    if failed:
        if not _runs(venv, "-c", "import pip") and not _runs(venv, "-m", "ensurepip"):
            raise RuntimeError(f"{python} {NO_PIP}")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "2"]
        if failed := _run([*pip, *common, "--progress-bar", "off"], log):
            if "Installing collected packages" not in log.read_text(encoding="utf-8"):
                unfinished.unlink()  # nothing has changed, so the next attempt continues from here
            raise RuntimeError(f"{failed} (the output of pip: {log})")
    unfinished.unlink()
    print(f"installed into {venv} in {time.monotonic() - begun:.0f} s", flush=True)


def _runs(venv: Path, *argv: str) -> bool:
    python = venv / "bin" / "python"
    try:
        return subprocess.run([python, *argv], capture_output=True).returncode == 0
    except OSError:  # none, or one of another kind of machine
        return False


def _remove(venv: Path) -> None:
    """Remove what an unfinished attempt left, and nothing else."""
    own = (venv / "pyvenv.cfg").is_file() or (venv / ".installing").exists()
    if not venv.is_dir() or (any(venv.iterdir()) and not own):
        raise RuntimeError(
            f"{venv} is no virtual environment; remove it, or name another folder: make VENV=FOLDER"
        )
    print(f"  {venv} is not whole; making it again", flush=True)
    shutil.rmtree(venv)


def _make(venv: Path, unfinished: Path, with_pip: bool) -> None:
    """Make a virtual environment; one that fails leaves nothing."""
    needed = ["venv", "ensurepip"] if with_pip else ["venv"]
    if not all(importlib.util.find_spec(module) for module in needed):
        raise RuntimeError(f"{sys.executable} {NO_PIP}")
    venv.mkdir()
    unfinished.touch()
    command = [sys.executable, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(venv)]
    if failed := _run(command, venv / "install.log"):
        shutil.rmtree(venv, ignore_errors=True)
        raise RuntimeError(f"{' '.join(command)}: {failed}, or make PYTHON=/path/to/python3")


def _run(command: list[str], log: Path) -> str | None:
    """Run an installer and show its progress; returns why it failed, None if it did not."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as file, process:
        for line in process.stdout:
            file.write(line)
            if re.match(SHOWN, line.strip()):
                print(f"  {line.strip()[:90]}", flush=True)
    return _reason(log.read_text(encoding="utf-8")) if process.returncode else None


def _reason(text: str) -> str:
    """Why an installer failed, and what to do, from its output."""
    if "No space left on device" in text:
        return "the disk is full; make room and run make again"
    if re.search(NETWORK, text):
        return (
            "the package index cannot be reached; check the network (or pip's index and proxy) "
            "and run make again"
        )
    lacking = r"No matching distribution found for (\S+)|Because (?:there is|only) (?:no )?(\S+)"
    if found := re.search(lacking, text):
        wanted = (found[1] or found[2]).rstrip(";,")
        return (
            f"the package index has no {wanted} for Python {sys.version.split()[0]} on "
            f"{sys.platform}; use an index that has it (pip config set global.index-url URL), or "
            "another Python: make PYTHON=/path/to/python3.12"
        )
    errors = [x.strip() for x in text.splitlines() if re.match(r"\s*(ERROR|error)\b", x)]
    last = (errors or text.strip().splitlines() or ["it gave no reason"])[-1]
    return f"{last}; fix that and run make again"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
