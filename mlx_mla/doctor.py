"""Describe this machine, list what to fix, and check that everything works:
`python -m mlx_mla.doctor [--check]`.

MLX and PyTorch are measured in separate processes, so neither loads the other's libraries.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, cast, get_args

from packaging.requirements import Requirement

from mlx_mla import cli
from mlx_mla.backends import blas, get_backend
from mlx_mla.errors import UserError, last_line
from mlx_mla.machine import memory, processor, version
from mlx_mla.model.config import BackendName, DType

PROG = "python -m mlx_mla.doctor"
FORM = "I ran it on a Mac"
"""Name of the issue form for reports."""
PACKAGES = ("mlx-mla", "mlx", "mlx-lm", "torch", "transformers", "tokenizers", "tiktoken", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


@dataclasses.dataclass(kw_only=True)
class DoctorCommand:
    """Describe this machine and list what to fix."""

    check: bool = False
    """Also run every check that has not been run on Apple silicon and that this machine supports,
    and write check.json and check.md. Takes minutes. Exits with 1 if a check fails."""
    out: Optional[Path] = None
    """Folder for the two files of --check. None: runs/check."""


def _main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["--probe"]:  # this command calls itself this way
        print(json.dumps(probe(cast(BackendName, argv[1]))))
        return 0
    command = cli.parse(DoctorCommand, argv, PROG)
    if command.out is not None and not command.check:
        raise UserError("--out requires --check; add --check or leave out --out")
    out = command.out or Path("runs/check")
    if command.check and out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not a folder; give --out another name")
    facts, advice = examine()
    print("\n".join(f"{key:<24}{value}" for key, value in facts.items()))
    print("\nto fix:" if advice else "\nnothing to fix")
    for item in advice:
        print(f"  - {item}")
    return _check(facts, advice, out) if command.check else 0


def _check(facts: dict[str, str], advice: list[str], out: Path) -> int:
    from mlx_mla.checks.rows import ROWS
    from mlx_mla.checks.runner import check

    print()
    results = check(ROWS, facts, advice, out)
    failed = sum(result.status == "fail" for result in results)
    passed = sum(result.status == "pass" for result in results)
    print(f"\n{passed} passed, {failed} failed, {len(results) - passed - failed} skipped")
    print(f"report      {out / 'check.md'}  (and check.json)")
    print(f'please send it with the form "{FORM}": {form_address()}')
    return cli.EXIT_FAULT if failed else 0


def examine() -> tuple[dict[str, str], list[str]]:
    """Return facts about this machine by label, and a list of what to fix."""
    facts = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": memory(),
        "free disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB here",
        "packages": ", ".join(f"{p} {version(p)}" for p in PACKAGES),
    }
    advice = _missing()
    for name in get_args(BackendName):
        if name == "torch" and importlib.util.find_spec(name) is None:
            facts["PyTorch"] = "not installed; optional (pip install torch)"
            continue
        found = _run_probe(name)
        if "error" in found:
            facts[name] = f"does not work: {found['error']}"
            if name == "mlx":
                advice.append(
                    "install MLX: pip install 'mlx[cpu]' on Linux, pip install mlx on a Mac"
                )
            else:
                advice.append(
                    "install PyTorch again, for --backend torch: pip install --force-reinstall "
                    "torch"
                )
            continue
        facts |= found["facts"]
        advice += found["advice"]
    return facts, advice


def _missing() -> list[str]:
    """What to install of the packages that this project needs."""
    advice = []
    for text in importlib.metadata.requires("mlx-mla") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found, wanted = version(needed.name), f"{needed.name}{needed.specifier}"
        if found == "missing" or not needed.specifier.contains(found, prereleases=True):
            advice.append(f"{needed.name} is {found}: pip install '{wanted}'")
    return advice


def probe(name: BackendName) -> dict[str, Any]:
    """Return the facts and the speed of a backend in this process, and what to fix."""
    backend = get_backend(name)
    title = {"mlx": "MLX", "torch": "PyTorch"}[name]
    # Training reports its MFU relative to these peaks.
    rates = {
        f"{title} matmul {dtype}": f"{backend.peak_flops(dtype) / 1e9:,.1f} GFLOP/s"
        for dtype in get_args(DType)
    }
    hint = blas.hint() if name == "mlx" else None
    return {"facts": {**backend.device_info(), **rates}, "advice": [hint] if hint else []}


def _run_probe(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_mla.doctor", "--probe", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": last_line(done.stderr)}
    return json.loads(done.stdout.splitlines()[-1])


def form_address() -> str:
    """Address of the issue form in the repository that this checkout was cloned from.

    Returns:
        Its URL on GitHub; the path of the form's file if the repository is elsewhere.
    """
    root, remote = Path(__file__).parent.parent, ""
    if (root / ".git").exists():  # otherwise git would take the repository that this lies in
        with contextlib.suppress(OSError):  # no git
            remote = subprocess.run(
                ["git", "-C", str(root), "remote", "get-url", "origin"],
                capture_output=True,
                text=True,
                check=False,
            ).stdout.strip()
    name = re.search(r"\bgithub\.com[:/](.+?)(?:\.git)?/?$", remote)
    if name is None:
        return ".github/ISSUE_TEMPLATE/mac.yml"
    return f"https://github.com/{name[1]}/issues/new?template=mac.yml"


if __name__ == "__main__":
    sys.exit(main())
