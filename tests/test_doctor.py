"""The doctor, and the loading of OpenBLAS."""

import os
import re
import subprocess
import sys

import pytest
from conftest import python

from mlx_mla import doctor


def run(code: str, **env: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    done = subprocess.run(
        python("-c", code), capture_output=True, text=True, check=False, env={**inherited, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_doctor_reports_every_part(capfd):
    assert doctor.main([]) == 0
    said = capfd.readouterr().out
    for part in ("system", "memory", "MLX device", "MLX BLAS", "PyTorch", "fix"):
        assert part in said
    for dtype in ("float32", "bfloat16"):
        speed = re.search(rf"MLX matmul {dtype}\s+([\d,.]+) GFLOP/s", said)
        assert float(speed.group(1).replace(",", "")) > 0


def test_doctor_takes_no_arguments(capfd):
    assert doctor.main(["--fast"]) == 2
    assert "takes none" in capfd.readouterr().err
    assert doctor.main(["--help"]) == 0


def test_doctor_says_what_to_install(monkeypatch):
    def probe(name):
        return {"error": "ModuleNotFoundError: No module named 'x'"}

    monkeypatch.setattr(doctor, "_run_probe", probe)
    _, advice = doctor.examine()
    assert any("pip install torch" in line for line in advice)
    assert any("install MLX" in line for line in advice)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def has_openblas() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libopenblas.so.0")
    except OSError:
        return False
    return True


@linux
def test_openblas_is_loaded_when_there_and_hinted_at_when_not():
    told = run("import mlx_mla.blas as b; print(b.load_openblas(), '|', b.hint())")
    if has_openblas():
        assert told == "libopenblas.so.0 | None"
    else:
        assert "sudo apt-get install libopenblas0-pthread" in told


@linux
def test_openblas_comes_too_late_after_mlx():
    told = run("import mlx.core, mlx_mla.blas as b; print(b.load_openblas(), '|', b.hint())")
    assert told.startswith("None | ")
    assert "import mlx_mla.backends.mlx first" in told or "apt-get install" in told


@linux
def test_openblas_can_be_switched_off_and_its_environment_is_left_alone():
    assert (
        run("import mlx_mla.blas as b; print(b.load_openblas(), b.hint())", MLX_MLA_BLAS="off")
        == "None None"
    )
    assert (
        run("import mlx_mla.backends.mlx, os; print(os.environ.get('OPENBLAS_CORETYPE'))") == "None"
    )
    assert (
        run(
            "import mlx_mla.backends.mlx, os; print(os.environ['OPENBLAS_CORETYPE'])",
            OPENBLAS_CORETYPE="Haswell",
        )
        == "Haswell"
    )


@linux
@pytest.mark.skipif(not has_openblas(), reason="needs libopenblas0-pthread")
def test_mlx_really_multiplies_with_openblas():
    """OpenBLAS and the reference BLAS round differently, so a product tells which one ran."""
    code = (
        "import mlx_mla.backends.mlx, mlx.core as mx; mx.random.seed(0); a = "
        "mx.random.normal((300, 300)); "
        "print((a @ a)[:5, :5].tolist())"
    )
    assert run(code) != run(code, MLX_MLA_BLAS="off")


@linux
@pytest.mark.skipif(not has_openblas(), reason="needs libopenblas0-pthread")
def test_pytorch_keeps_its_own_blas():
    """PyTorch's product has the same bits whether MLX's OpenBLAS was loaded or not."""
    pytest.importorskip("torch")
    code = (
        "import torch; torch.manual_seed(0); a = torch.randn(300, 300); "
        "print((a @ a)[:5, :5].tolist())"
    )
    assert run(f"import mlx_mla.backends.mlx; {code}") == run(code)
