"""Make the environment of the Makefile's commands: `python tools/install.py VENV [EXTRAS]`.

Says at once what it does, and how much that is; goes on where an earlier attempt ended; takes uv
where that is on the PATH, else pip. What goes wrong ends in one line with what to do, and exit code
2. Needs nothing but Python 3.10.
"""

import importlib.util
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"": "160 MB to download, 750 MB on disk", "dev": "240 MB to download, 1.0 GB on disk"}
"""By extras, measured on Linux x86-64, Python 3.11."""
WITH_TORCH = "470 MB to download and 2.2 GB on disk with PyTorch for the CPU"
QUIET_SECONDS = 5

NETWORK = (
    "NewConnectionError|NameResolutionError|Temporary failure in name resolution|Name or service "
    "not known|Network is unreachable|Connection refused|ConnectTimeout|ReadTimeout|timed "
    "out|ProxyError|SSLError|dns error|error sending request|Connection reset"
)


class Failure(Exception):
    """What went wrong, and what to do about it, in one line."""


def main(argv: list[str]) -> int:
    venv, extras = Path(argv[0]), argv[1] if len(argv) > 1 else ""
    try:
        install(venv, extras)
    except Failure as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next make begins this set-up anew", file=sys.stderr)
        return 130
    return 0


def install(venv: Path, extras: str) -> None:
    """Make the environment if it is not whole, and install this project with its extras into it."""
    for folder in (ROOT, venv.parent):
        if not os.access(folder, os.W_OK):
            raise Failure(
                f"{folder.resolve()} cannot be written; clone the project to where you may write"
            )
    begun = time.monotonic()
    uv = shutil.which("uv")
    size = SIZES.get(extras, WITH_TORCH)
    print(f"installing into {venv}: {size}; with {'uv' if uv else 'pip'}", flush=True)
    unfinished = venv / ".installing"
    if venv.exists() and (unfinished.exists() or not _runs(venv, "pass")):
        _remove(venv)
    if not venv.exists():
        _make(venv, unfinished, with_pip=uv is None)
    unfinished.touch()
    log = venv / "install.log"
    target = f".[{extras}]" if extras else "."
    common = ["install", "-c", "constraints.txt", "-e", target]
    failed: str | None = None
    if uv:
        python = str(venv / "bin" / "python")
        if failed := _run([uv, "pip", *common, "--python", python], log):
            print(f"  uv: {failed}; trying pip", flush=True)
    if not uv or failed:
        _require_pip(venv)
        pip = [
            str(venv / "bin" / "python"),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "--retries",
            "2",
        ]
        if failed := _run([*pip, *common, "--progress-bar", "off"], log):
            if "Installing collected packages" not in log.read_text(encoding="utf-8"):
                unfinished.unlink()  # nothing has changed, and the next attempt goes on from here
            raise Failure(f"{failed} (all that pip said: {log})")
    unfinished.unlink()
    megabytes = sum(f.lstat().st_size for f in venv.rglob("*") if not f.is_symlink()) / 1e6
    print(
        f"installed in {time.monotonic() - begun:.0f} s; {venv} has {megabytes:,.0f} MB", flush=True
    )


def _runs(venv: Path, code: str) -> bool:
    python = venv / "bin" / "python"
    return (
        python.exists()
        and subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    )


def _remove(venv: Path) -> None:
    """Remove what an attempt that did not finish has left, and nothing else."""
    if not venv.is_dir() or (
        any(venv.iterdir())
        and not (venv / "pyvenv.cfg").is_file()
        and not (venv / ".installing").exists()
    ):
        raise Failure(
            f"{venv} is no virtual environment; remove it, or name another folder: make VENV=FOLDER"
        )
    print(f"  {venv} is not whole; making it anew", flush=True)
    shutil.rmtree(venv)


def _make(venv: Path, unfinished: Path, with_pip: bool) -> None:
    """Make a virtual environment; one that fails leaves nothing."""
    if not _has("venv") or (with_pip and not _has("ensurepip")):
        raise Failure(_no_pip(sys.executable))
    venv.mkdir()
    unfinished.touch()
    flags = [] if with_pip else ["--without-pip"]
    done = subprocess.run(
        [sys.executable, "-m", "venv", *flags, venv], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise Failure(
            f"{sys.executable} -m venv {venv} failed: {said[-1]}; another Python: make "
            "PYTHON=/path/to/python3"
        )


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _no_pip(python: str) -> str:
    return (
        f"{python} cannot make virtual environments with pip (no venv or ensurepip module); "
        "install it (Debian and Ubuntu: sudo apt-get install python3-venv), or uv, or name "
        "another Python: make PYTHON=/path/to/python3"
    )


def _require_pip(venv: Path) -> None:
    """Add pip to an environment that uv was to fill."""
    if _runs(venv, "import pip"):
        return
    python = venv / "bin" / "python"
    done = subprocess.run([python, "-m", "ensurepip"], capture_output=True, check=False)
    if done.returncode != 0:
        raise Failure(_no_pip(str(python)))


def _run(command: list[str], log: Path) -> str | None:
    """Run an installer, showing how it gets on; returns why it failed, None if it did not."""
    lines: list[str] = []
    with log.open("w", encoding="utf-8") as file:
        for line in _output(command):
            lines.append(line)
            file.write(line + "\n")
            if shown := _progress(line):
                print(f"  {shown}", flush=True)
    return None if lines.pop() == "0" else _reason("\n".join(lines))


def _output(command: list[str]) -> Iterator[str]:
    """The lines that a command prints, with signs of life where it prints none; the last is its
    exit code."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    stdout = process.stdout
    assert stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    begun = shown = time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=1)
                if line is None:
                    break
                shown = time.monotonic() if _progress(line) else shown
                yield line
            except queue.Empty:
                pass
            if time.monotonic() - shown >= QUIET_SECONDS:
                shown = time.monotonic()
                print(f"  ... {shown - begun:.0f} s", flush=True)
        yield str(process.wait())
    finally:
        process.terminate()
        process.wait()


def _progress(line: str) -> str | None:
    """What of an installer's line is worth showing: large downloads, and the last part."""
    if found := re.search(r"Downloading (\S+?)(?:-\d\S*)? \((\d[\d.]*) ?([MG])i?B", line):
        name, size, unit = found.groups()
        return f"{name}, {size} {unit}B" if unit == "G" or float(size) >= 5 else None
    if line.startswith("Installing collected packages"):
        return f"unpacking {line.count(',') + 1} packages"
    return (
        line.strip()
        if re.match(r"(Resolved|Prepared|Installed) \d+ packages? in", line.strip())
        else None
    )


def _reason(text: str) -> str:
    """Why an installer failed, and what to do, from what it printed."""
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}"
    if "No space left on device" in text:
        return "the disk is full; make room and run make again"
    if re.search(NETWORK, text):
        return (
            "the package index cannot be reached; check the network (or pip's index and proxy) "
            "and run make again"
        )
    lacking = re.search(
        r"No matching distribution found for (\S+)|Because (?:there is|only) (?:no )?(\S+)", text
    )
    if lacking:
        wanted = next(g for g in lacking.groups() if g).rstrip(";,")
        return (
            f"the package index has no {wanted} for {python}; use an index that has it (pip config "
            "set global.index-url URL), or another Python: make PYTHON=/path/to/python3.12"
        )
    errors = [x.strip() for x in text.splitlines() if re.match(r"\s*(ERROR|error)\b", x)]
    last = (errors or text.strip().splitlines() or ["it gave no reason"])[-1]
    return f"{last}; mend that and run make again"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
