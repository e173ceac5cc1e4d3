"""The doctor."""

import re

import pytest
from helpers import refused

from mlx_mla import doctor


@pytest.mark.slow
def test_doctor_reports_every_part(capfd):
    assert doctor.main([]) == 0
    said = capfd.readouterr().out
    for part in ("system", "memory", "MLX device", "MLX BLAS", "PyTorch", "fix"):
        assert part in said
    for dtype in ("float32", "bfloat16"):
        speed = re.search(rf"MLX matmul {dtype}\s+([\d,.]+) GFLOP/s", said)
        assert float(speed.group(1).replace(",", "")) > 0


def test_doctor_refuses_what_it_does_not_know(capsys, tmp_path):
    assert "unknown argument '--chek'; did you mean --check?" in refused(
        capsys, "--chek", command=doctor.main
    )
    assert "--out requires --check" in refused(capsys, "--out", tmp_path, command=doctor.main)
    (tmp_path / "file").touch()
    argv = ("--check", "--out", tmp_path / "file")
    assert "is not a folder; give --out" in refused(capsys, *argv, command=doctor.main)


def test_doctor_names_packages_that_are_missing_or_too_old(monkeypatch):
    real = doctor.version
    found = {"tiktoken": "missing", "transformers": "4.40.0"}
    monkeypatch.setattr(doctor, "version", lambda name: found.get(name) or real(name))
    monkeypatch.setattr(doctor, "_run_probe", lambda name: {"facts": {}, "advice": []})
    assert [text.split(":")[0] for text in doctor.examine()[1]] == [
        "tiktoken is missing", "transformers is 4.40.0",
    ]  # fmt: skip


def test_doctor_says_what_to_install(monkeypatch):
    def probe(name):
        return {"error": "ModuleNotFoundError: No module named 'x'"}

    monkeypatch.setattr(doctor, "_run_probe", probe)
    _, advice = doctor.examine()
    assert any("install MLX" in line for line in advice)
