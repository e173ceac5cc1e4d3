"""Give MLX a fast CPU matmul on Linux.

The Linux wheel of MLX bundles the reference BLAS, which multiplies float32 matrices about 30 times
slower than OpenBLAS does. Loading OpenBLAS into the global symbol scope before `mlx.core` is first
imported makes the dynamic linker resolve MLX's `cblas_*` calls to it. macOS needs none of this: MLX
uses Accelerate and Metal there.
"""

import contextlib
import ctypes
import ctypes.util
import os
import sys

HINT = (
    "OpenBLAS not found, so CPU matmul runs about 30x slower; "
    "install it with: sudo apt-get install libopenblas0-pthread"
)

_loaded: str | None = None


def load_openblas() -> str | None:
    """Load OpenBLAS for MLX where that helps, once; the MLX backend calls this before it imports
    MLX.

    Returns:
        The name of the loaded library, or None where it is not needed (not Linux), not found, too
        late (MLX was imported first) or switched off with `MLX_MLA_BLAS=off`.
    """
    global _loaded
    if _loaded or not sys.platform.startswith("linux"):
        return _loaded
    if os.environ.get("MLX_MLA_BLAS") == "off" or "mlx.core" in sys.modules:
        return None
    # PyTorch binds its own BLAS when it is loaded, and would bind to a global OpenBLAS if it came
    # after (measured: 9 instead of 196 GFLOP/s). transformers imports it anyway where it is
    # installed.
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    core = None if "OPENBLAS_CORETYPE" in os.environ else _core_type()
    if core:
        os.environ["OPENBLAS_CORETYPE"] = core
    try:
        for name in ("libopenblas.so.0", "libopenblas.so"):
            try:
                ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            _loaded = name
            return name
        return None
    finally:
        if core:  # other libraries' own OpenBLAS must still choose for itself
            del os.environ["OPENBLAS_CORETYPE"]


def _core_type() -> str | None:
    """OpenBLAS's kernel family for this processor, from its feature flags.

    OpenBLAS 0.3.21 (Debian 12) goes by model number, and runs SSE3 kernels, six times slower, on
    processors that are newer than itself.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            flags = next((set(line.split()) for line in f if line.startswith("flags")), set())
    except OSError:
        return None
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None


def hint() -> str | None:
    """One line of advice when this machine lacks OpenBLAS, else None."""
    if not sys.platform.startswith("linux") or os.environ.get("MLX_MLA_BLAS") == "off" or _loaded:
        return None
    if "mlx.core" in sys.modules and ctypes.util.find_library("openblas"):
        return (
            "MLX was imported before OpenBLAS; import mlx_mla.backends.mlx first, "
            "or set LD_PRELOAD=libopenblas.so.0"
        )
    return HINT


def in_use() -> str:
    """What multiplies matrices for MLX on the CPU."""
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    name = load_openblas()
    return f"OpenBLAS ({name})" if name else "the reference BLAS of the wheel (slow)"
