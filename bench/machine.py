"""The machine that figures come from."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence

from mlx_mla import blas
from mlx_mla.machine import memory, processor

PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "numpy")


def machine(backends: Sequence[str], packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """What figures depend on, and that can be told."""
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": memory(),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "as the libraries choose"),
    }
    for package in packages:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "missing"
    if "mlx" in backends:
        facts["MLX BLAS"] = blas.in_use()
        import mlx.core as mx

        facts["MLX device"] = str(mx.default_device())
    return facts


def report_name(kind: str) -> str:
    """Name of a report: the processor, the date and the kind of report."""
    words = (
        "".join(c if c.isalnum() else " " for c in processor().replace("(R)", "")).lower().split()
    )
    return f"{'-'.join(words)}-{os.cpu_count()}cores_{datetime.date.today().isoformat()}_{kind}"
