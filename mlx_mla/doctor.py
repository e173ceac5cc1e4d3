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
from typing import Any, get_args

from mlx_mla import blas, cli
from mlx_mla.backend import BackendName, DType, get_backend, physical_memory
from mlx_mla.errors import UserError

PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "tokenizers", "tiktoken", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["--probe"]:  # how this command calls itself
        print(json.dumps({"mlx": probe_mlx, "torch": probe_torch}[argv[1]]()))
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
            f"{platform.system()} {platform.release()}, {platform.machine()}, Python {platform.python_version()}",
        ),
        _row("processor", f"{processor()}, {os.cpu_count()} cores"),
        _row("memory", memory()),
        _row("free disk", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB here"),
        _row("packages", ", ".join(f"{p} {_version(p)}" for p in PACKAGES)),
    ]
    advice = []
    for name in ("mlx", "torch"):
        if name == "torch" and importlib.util.find_spec(name) is None:
            lines.append(_row("PyTorch", "not installed; only what names it needs it (pip install torch)"))
            continue
        facts = _run_probe(name)
        if "error" in facts:
            lines.append(_row(name, f"does not work: {facts['error']}"))
            if name == "mlx":
                advice.append("install MLX: pip install 'mlx[cpu]' on Linux, pip install mlx on a Mac")
            else:
                advice.append("install PyTorch again, for --backend torch: pip install --force-reinstall torch")
            continue
        lines += [_row(key, value) for key, value in facts["lines"]]
        advice += facts["advice"]
    return lines, advice


def probe_mlx() -> dict[str, Any]:
    """Facts and speed of MLX in this process."""
    blas.load_openblas()
    import mlx.core as mx

    info = mx.device_info()
    lines = [
        ("MLX device", f"{mx.default_device()} ({info.get('device_name', 'unknown')})"),
        ("MLX GPU", "Metal" if mx.metal.is_available() else "CUDA" if mx.is_available(mx.gpu) else "none"),
        ("MLX BLAS", mlx_blas()),
    ]
    if "max_recommended_working_set_size" in info:
        lines.append(
            ("MLX memory limit", f"{int(info['max_recommended_working_set_size']) / 2**30:.1f} GiB recommended")
        )
    lines += _matmul_rates("MLX", "mlx")
    return {"lines": lines, "advice": [hint] if (hint := blas.hint()) else []}


def probe_torch() -> dict[str, Any]:
    """Facts and speed of PyTorch in this process."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    lines = [
        ("PyTorch device", device),
        (
            "PyTorch BLAS",
            f"{'MKL' if torch.backends.mkl.is_available() else 'other'}, {torch.get_num_threads()} threads",
        ),
    ]
    lines += _matmul_rates("PyTorch", "torch")
    return {"lines": lines, "advice": []}


def _matmul_rates(title: str, name: BackendName) -> list[tuple[str, str]]:
    """The peaks against which training's MFU is taken."""
    backend, dtypes = get_backend(name), get_args(DType)
    return [(f"{title} matmul {dtype}", f"{backend.peak_flops(dtype) / 1e9:,.1f} GFLOP/s") for dtype in dtypes]


def _run_probe(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_mla.doctor", "--probe", name], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def mlx_blas() -> str:
    """What multiplies matrices for MLX on the CPU."""
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    name = blas.load_openblas()
    return f"OpenBLAS ({name})" if name else "the reference BLAS of the wheel (slow)"


def processor() -> str:
    """Name of the processor, as the system tells it."""
    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def memory() -> str:
    """Memory of the machine."""
    return f"{physical_memory() / 2**30:.1f} GiB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _row(key: str, value: str) -> str:
    return f"{key:<24}{value}"


if __name__ == "__main__":
    sys.exit(main())
