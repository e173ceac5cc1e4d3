"""`python -m mlx_mla.doctor --check`: its list of rows, what they notice, and its report."""

import ast
import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import python

from mlx_mla import doctor
from mlx_mla.backends import get_backend
from mlx_mla.checks import __main__ as one_row
from mlx_mla.checks import models, runner, training
from mlx_mla.checks.row import NEEDS, Outcome, Row, at_most, together
from mlx_mla.checks.rows import ROWS

ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {row.name: row for row in ROWS}
FACTS = {"system": "Linux", "MLX GPU": "none", "PyTorch device": "cpu"}


def symbols(file: Path) -> set[str]:
    """Names that a file defines, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_name_places_in_the_code_that_exist(row):
    assert row.where
    for place in row.where:
        file, _, symbol = place.partition(":")
        assert (ROOT / file).is_file(), place
        assert not symbol or symbol in symbols(ROOT / file), place
    assert set(row.needs) <= NEEDS.keys()


def test_rows_have_names_of_their_own():
    assert len(BY_NAME) == len(ROWS)


def test_the_page_for_mac_owners_has_the_rows():
    page = one_row.PAGE.read_text(encoding="utf-8")
    assert page == one_row.with_rows(page), "write them: python -m mlx_mla.checks"
    assert f'"{doctor.FORM}"' in " ".join(page.split())
    assert all(f"| `{name}` |" in page for name in BY_NAME)


def test_the_issue_form_asks_for_the_report():
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "mac.yml").read_text(encoding="utf-8")
    assert f"name: {doctor.FORM}\n" in form
    assert "python -m mlx_mla.doctor --check" in form and "check.md" in form


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return models.small_model(tmp_path_factory.mktemp("models") / "nano")


def test_regret_is_what_a_token_lacks_of_the_likeliest(folder):
    backend = get_backend("mlx", "cpu")
    scorer, prompt = backend.scorer(folder), [1, 2, 3]
    rows = models.log_probabilities(scorer, np.array([[*prompt, 7]], np.int32), np.arange(4))
    np.testing.assert_allclose(np.exp(rows).sum(-1), 1, rtol=1e-5)
    order = rows[2].argsort()
    best, third = int(order[-1]), int(order[-3])
    assert models.regret(scorer, prompt, [best]) == 0
    lacking = float(rows[2, best] - rows[2, third])
    assert models.regret(scorer, prompt, [third]) == pytest.approx(lacking, abs=1e-4) != 0


@pytest.mark.slow
def test_decoding_that_is_wrong_fails(tmp_path, monkeypatch):
    """Keys and queries whose scores are scaled wrongly in the absorbed path alone."""
    from mlx_mla.model.model_mlx import LatentAttention

    right = LatentAttention._attend_absorbed

    def wrong(self, q, *rest):
        return right(self, 1.1 * q, *rest)

    monkeypatch.setattr(models, "PRESETS", ["nano", "mla-124m"])
    assert together(models.absorbed(tmp_path / "right")).passed
    monkeypatch.setattr(LatentAttention, "_attend_absorbed", wrong)
    outcome = together(models.absorbed(tmp_path / "wrong"))
    assert not outcome.passed, outcome.figure


def test_steps_that_are_wrong_fail(monkeypatch):
    from mlx_mla.backends.mlx.session import MLXTrainSession

    backend, config = get_backend("mlx", "cpu"), training.small_training(compile=False)
    step, expected = MLXTrainSession.step, training.losses(backend, config)

    def smaller(self, number, rate, batches):
        return step(self, number, 0.9 * rate, batches)

    monkeypatch.setattr(MLXTrainSession, "step", smaller)
    found, bound = training.losses(backend, config), training.TOLERANCE["float32"]
    assert training.compared(expected, expected, bound, "x").passed
    assert not training.compared(found, expected, bound, "x").passed


@pytest.mark.slow
@pytest.mark.parametrize(("share", "passes"), [(1.0, True), (0.5, False)])
def test_memory_is_judged_by_the_estimate_and_not_by_speed(share, passes, tmp_path, monkeypatch):
    """A busy machine measures a peak that its steps then beat."""
    from mlx_mla.backends.mlx.backend import MLXBackend
    from mlx_mla.backends.mlx.session import MLXTrainSession

    peak = MLXTrainSession.peak_memory_bytes
    monkeypatch.setattr(MLXTrainSession, "peak_memory_bytes", lambda self: int(share * peak(self)))
    monkeypatch.setattr(MLXBackend, "peak_flops", lambda self, dtype: 1.0)
    outcome = together(training.memory(tmp_path))
    assert outcome.passed == passes, outcome.figure


def test_fused_kernels_are_held_against_float64(tmp_path):
    """The reference of the rows for Metal, against MLX's unfused attention."""
    import mlx.core as mx

    from mlx_mla.checks import metal

    if mx.metal.is_available():
        assert together(metal.fused_decoding(tmp_path)).passed
    for queries in (1, 4):
        for dtype, tolerance in metal.TOLERANCE.items():
            assert metal.difference(192, 128, queries, dtype) <= tolerance


def test_parts_are_reported_by_their_largest_and_what_failed_first():
    assert together([Outcome(True, "a"), Outcome(False, "b")]) == Outcome(False, "b; a")
    parts = [at_most(value, 1, "x", of) for value, of in ((0, "a"), (0.7, "b"), (0.5, "c"))]
    assert together(parts) == Outcome(True, "x 0.7 (at most 1), b")
    assert together([*parts, at_most(float("nan"), 1, "x")]) == Outcome(False, "x nan (at most 1)")


@pytest.mark.parametrize(
    ("device", "there"),
    [
        (None, set()), ("cpu", {"torch"}), ("mps", {"torch", "torch-gpu", "mps"}),
        ("cuda (NVIDIA H200)", {"torch", "torch-gpu"}),
    ],
)  # fmt: skip
def test_a_device_of_pytorch_meets_the_needs_of_rows(device, there):
    facts = {"MLX GPU": "none", **({"PyTorch device": device} if device else {})}
    assert runner.available(facts) & {"torch", "torch-gpu", "mps"} == there


def row(name: str, **fields) -> Row:
    return dataclasses.replace(BY_NAME["facts"], name=name, **fields)


def test_the_report_has_every_row_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    found = {
        "good": Outcome(True, "0.5 of x|y"),
        "bad": Outcome(False, "ValueError: no"),
        "last": Outcome(True, "fine"),
    }
    monkeypatch.setattr(runner, "run_row", lambda row: found[row.name])
    rows = [row("good"), row("bad"), row("elsewhere", needs=("mps",)), row("last")]
    results = runner.check(rows, FACTS, ["a thing"], tmp_path / "new" / "out")
    assert [r.status for r in results] == ["pass", "fail", "skip", "pass"]
    written = json.loads((tmp_path / "new" / "out" / "check.json").read_text())
    assert written["facts"] == FACTS and written["to_fix"] == ["a thing"]
    assert [r["figure"] for r in written["rows"]] == [
        "0.5 of x|y", "ValueError: no", "needs a Mac's GPU in PyTorch (MPS)", "fine",
    ]  # fmt: skip
    said = (tmp_path / "new" / "out" / "check.md").read_text()
    assert "2 passed, 1 failed, 1 skipped" in said and "0.5 of x\\|y" in said
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("[ 2/4] bad        fail  ValueError: no")


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (f"raise ValueError('no file {ROOT}/x\\nand more')", r"^ValueError: no file \./x; as far$"),
        ("sys.stderr.write('at the end'); sys.stderr.flush(); os.abort()",
         "^ended with exit code -6: at the end; as far$"),
    ],
    ids=["raises", "is killed"],
)  # fmt: skip
def test_a_row_that_breaks_fails_with_one_line_and_keeps_what_it_found(
    ending, expected, monkeypatch
):
    """In a real process of its own."""
    code = (
        "import sys, os, dataclasses; from mlx_mla.checks import __main__ as m\n"
        "def broken(place):\n"
        "    yield m.Outcome(True, 'as far')\n"
        f"    {ending}\n"
        "m.ROWS = [dataclasses.replace(m.ROWS[0], name='x', run=broken)]\n"
        "m.main(['x'])\n"
    )
    monkeypatch.setattr(runner, "command", lambda row: python("-c", code))
    outcome = runner.run_row(row("x"))
    assert not outcome.passed
    assert re.search(expected, outcome.figure)


@pytest.mark.slow
def test_a_row_that_hangs_ends_with_all_that_it_started(monkeypatch, tmp_path):
    started = tmp_path / "pid"
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
        f"'import time; time.sleep(60)']); open({str(started)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(runner, "command", lambda row: python("-c", code))
    monkeypatch.setattr(runner, "LIMIT", 3)
    outcome = runner.run_row(dataclasses.replace(row("x"), minutes=0))
    assert not outcome.passed and "did not end within" in outcome.figure
    status = Path(f"/proc/{started.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


@pytest.mark.parametrize("home", [None, "/tmp/anna", "/private/anna"])
@pytest.mark.parametrize("temporary", [None, "/tmp", "/private/anna/tmp"])
def test_reports_are_impersonal(home, temporary, monkeypatch):
    """Also where the home, the folder for temporary files and the checkout lie in one another."""
    if home is not None:
        monkeypatch.setenv("HOME", home)
    if temporary is not None:
        monkeypatch.setattr(runner.tempfile, "gettempdir", lambda: temporary)
    monkeypatch.setattr(runner.platform, "node", lambda: "annas-mac.local")
    said = runner.impersonal(
        f"{Path.home()}/x, /Users/anna/model, /home/bert/y and {ROOT}/z\non annas-mac.local"
    )
    assert said == "~/x, ~/model, ~/y and ./z on HOST"


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("git@github.com:ann/mla.git", "https://github.com/ann/mla/issues/new?template=mac.yml"),
        ("https://t:x@github.com/a/b", "https://github.com/a/b/issues/new?template=mac.yml"),
        ("/srv/mirror", ".github/ISSUE_TEMPLATE/mac.yml"),
        ("", ".github/ISSUE_TEMPLATE/mac.yml"),
    ],
)
def test_the_form_is_where_the_checkout_came_from(remote, address, monkeypatch):
    class Done:
        stdout = remote + "\n"

    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: Done)
    assert doctor.form_address() == address
    # Installed elsewhere, git would name the repository that this lies in.
    monkeypatch.setattr(doctor, "__file__", "/usr/lib/mlx_mla/doctor.py")
    assert doctor.form_address() == ".github/ISSUE_TEMPLATE/mac.yml"


def test_without_git_the_form_is_named_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    assert doctor.form_address() == ".github/ISSUE_TEMPLATE/mac.yml"


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_exit_code_and_last_lines(passed, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: (FACTS, []))
    monkeypatch.setattr(runner, "run_row", lambda row: Outcome(passed, "1"))
    assert doctor.main(["--check", "--out", str(tmp_path)]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert doctor.FORM in last and "mac.yml" in last


@pytest.mark.slow
def test_the_whole_command_on_this_machine(tmp_path):
    """Every row that this machine can run passes; the others say what they need."""
    out = tmp_path / "out"
    command = python("-m", "mlx_mla.doctor", "--check", "--out", str(out))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = json.loads((out / "check.json").read_text())["rows"]
    assert [r["name"] for r in rows] == [r.name for r in ROWS]
    assert [r for r in rows if r["status"] == "fail"] == []
    assert done.returncode == 0, done.stderr
    assert all(r["figure"].startswith("needs ") for r in rows if r["status"] == "skip")
    assert sum(r["status"] == "pass" for r in rows) >= 10
    written = done.stdout + (out / "check.md").read_text() + (out / "check.json").read_text()
    assert str(Path.home()) not in (out / "check.md").read_text()
    assert os.uname().nodename not in written
