"""Say what this machine offers and what to fix: `python -m mlx_mla.doctor`.

MLX and PyTorch are measured in a process each, so that neither sees the other's libraries.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, cast, get_args

from mlx_mla import blas, cli
from mlx_mla.backends import get_backend
from mlx_mla.config import BackendName, DType
from mlx_mla.errors import UserError
from mlx_mla.machine import memory, processor

PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "tokenizers", "tiktoken", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["--probe"]:  # how this command calls itself
        print(json.dumps(probe(cast(BackendName, argv[1]))))
        return 0
    if list(argv) in (["-h"], ["--help"]):
        print(f"usage: python -m mlx_mla.doctor [-h]\n\n{__doc__}")
        return 0
    if argv:
        raise UserError(f"unknown argument {argv[0]!r}; the doctor takes none")
    lines, advice = examine()
    print("\n".join(lines))
    print("\nto fix:" if advice else "\nnothing to fix")
    for item in advice:
        print(f"  - {item}")
    return 0


def examine() -> tuple[list[str], list[str]]:
    """The report's lines, and what to fix."""
    lines = [
        _row(
            "system",
            f"{platform.system()} {platform.release()}, {platform.machine()}, Python "
            f"{platform.python_version()}",
        ),
        _row("processor", f"{processor()}, {os.cpu_count()} cores"),
        _row("memory", memory()),
        _row("free disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB here"),
        _row("packages", ", ".join(f"{p} {_version(p)}" for p in PACKAGES)),
    ]
    advice = []
    for name in get_args(BackendName):
        if name == "torch" and importlib.util.find_spec(name) is None:
            lines.append(
                _row("PyTorch", "not installed; only what names it needs it (pip install torch)")
            )
            continue
        found = _run_probe(name)
        if "error" in found:
            lines.append(_row(name, f"does not work: {found['error']}"))
            if name == "mlx":
                advice.append(
                    "install MLX: pip install 'mlx[cpu]' on Linux, pip install mlx on a Mac"
                )
            else:
                advice.append(
                    "install PyTorch again, for --backend torch: "
                    "pip install --force-reinstall torch"
                )
            continue
        lines += [_row(key, value) for key, value in found["facts"].items()]
        advice += found["advice"]
    return lines, advice


def probe(name: BackendName) -> dict[str, Any]:
    """Facts and speed of a backend in this process, and what to fix."""
    backend = get_backend(name)
    title = {"mlx": "MLX", "torch": "PyTorch"}[name]
    # The peaks against which training's MFU is taken.
    rates = {
        f"{title} matmul {dtype}": f"{backend.peak_flops(dtype) / 1e9:,.1f} GFLOP/s"
        for dtype in get_args(DType)
    }
    hint = blas.hint() if name == "mlx" else None
    return {"facts": {**backend.facts(), **rates}, "advice": [hint] if hint else []}


def _run_probe(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_mla.doctor", "--probe", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _row(key: str, value: str) -> str:
    return f"{key:<24}{value}"


if __name__ == "__main__":
    sys.exit(main())
