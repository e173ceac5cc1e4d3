"""Runs rows one after the other and writes what they found: check.json and check.md.

check.json: {"facts": what the doctor says of the machine, "to_fix": its advice, "rows": [{"name",
"what", "status": pass, fail or skip, "figure": what was measured, or why there is nothing,
"expected", "seconds"}]}. Neither file has names of the user, the machine or its folders.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mlx_mla.checks.commands import ROOT
from mlx_mla.checks.row import NEEDS, Need, Outcome, Row, together
from mlx_mla.display import markdown_table
from mlx_mla.errors import last_line
from mlx_mla.files import write_text

SETTINGS = {
    # Else float32 products are rounded to TF32 on chips that have it, and parity is off by 1e-3.
    "MLX_ENABLE_TF32": "0",
    # No row needs the network.
    "HF_HUB_OFFLINE": "1",
}
"""Environment of every row, where the user's has no value."""


Status = Literal["pass", "fail", "skip"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of the report."""

    name: str
    what: str
    status: Status
    figure: str
    expected: str
    seconds: float


def check(
    rows: Sequence[Row], facts: Mapping[str, str], to_fix: Sequence[str], out: Path
) -> list[Result]:
    """Run rows, with a line of progress each, and write the report after every one.

    Args:
        facts: The facts from `doctor.examine`, which determine the rows that can run.
        to_fix: The advice from `doctor.examine`.
        out: Folder of the report, created if it does not exist.
    """
    out.mkdir(parents=True, exist_ok=True)
    there, results = available(facts), list[Result]()
    facts = {key: impersonal(value) for key, value in facts.items()}
    width = max(len(row.name) for row in rows)
    for number, row in enumerate(rows, 1):
        print(f"[{number:>2}/{len(rows)}] {row.name:<{width}}  ", end="", flush=True)
        began = time.monotonic()
        status: Status
        missing = [NEEDS[need] for need in row.needs if need not in there]
        if missing:
            status, figure = "skip", f"needs {' and '.join(missing)}"
        else:
            outcome = run_row(row)
            status, figure = "pass" if outcome.passed else "fail", outcome.figure
        seconds = round(time.monotonic() - began, 1)
        print(f"{status}  {figure}" + ("" if missing else f"  ({seconds:.0f} s)"), flush=True)
        results.append(Result(row.name, row.what, status, figure, row.expected, seconds))
        document = {
            "facts": facts,
            "to_fix": list(to_fix),
            "rows": [dataclasses.asdict(result) for result in results],
        }
        write_text(out / "check.json", json.dumps(document, indent=1) + "\n")
        write_text(out / "check.md", _page(facts, to_fix, results))
    return results


LIMIT = 600
"""Seconds that every row may take beside 20 times its own."""


def available(facts: Mapping[str, str]) -> set[Need]:
    """What rows may need, by the doctor's facts."""
    torch = facts.get("PyTorch device", "").partition(" ")[0]
    here: dict[Need, bool] = {
        "metal": facts.get("MLX GPU") == "Metal",
        "torch": bool(torch),
        "torch-gpu": torch in ("mps", "cuda"),
        "mps": torch == "mps",
        "compiler": not sys.platform.startswith("linux") or shutil.which("g++") is not None,
        "checkout": (ROOT / "bench").is_dir(),
    }
    return {need for need, is_here in here.items() if is_here}


def command(row: Row) -> list[str]:
    """Command line of the process of a row."""
    return [sys.executable, "-m", "mlx_mla.checks", row.name]


def run_row(row: Row) -> Outcome:
    """Run a row in a process of its own, which may crash or hang; what it found before counts."""
    limit = LIMIT + 20 * 60 * row.minutes
    file = functools.partial(tempfile.TemporaryFile, "w+", errors="replace")
    with file() as out, file() as err:
        env = {**SETTINGS, **os.environ}
        process = subprocess.Popen(
            command(row), stdout=out, stderr=err, env=env, start_new_session=True
        )
        try:
            code = process.wait(limit)
            ended = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, ended = 1, f"did not end within {limit / 60:.0f} minutes"
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        parts = [Outcome(**json.loads(line)) for line in out if line.startswith('{"passed"')]
        if code or not parts:
            parts.append(Outcome(False, f"{ended}: {last_line(err.read())}"))
    found = together(parts)
    return dataclasses.replace(found, figure=impersonal(found.figure))


def impersonal(text: str) -> str:
    """A message without the names of this machine, its folders and its user, on one line."""
    names = {str(Path.home()): "~", tempfile.gettempdir(): "TMP", str(ROOT): "."}
    for path in sorted(names, key=len, reverse=True):  # one may lie in another
        if len(path) > 1:
            text = text.replace(path, names[path])
    text = re.sub(r"/(?:Users|home)/[^/\s]+", "~", text)
    if host := platform.node():
        text = re.sub(rf"(?<!\w){re.escape(host)}(?!\w)", "HOST", text)
    return " ".join(text.split())


def _page(facts: Mapping[str, str], to_fix: Sequence[str], results: Sequence[Result]) -> str:
    """check.md."""
    count = Counter(r.status for r in results)
    machine = "\n".join(f"{key:<24}{value}" for key, value in facts.items())
    advice = "".join(f"\n- to fix: {item}" for item in to_fix)
    table = markdown_table(
        ("row", "", "figure", "expected", "s"),
        [(r.name, r.status, r.figure, r.expected, f"{r.seconds:.0f}") for r in results],
    )
    return (
        "# `python -m mlx_mla.doctor --check`\n\n"
        f"{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped\n\n"
        f"```\n{machine}\n```\n{advice}\n" + "\n".join(table) + "\n"
    )
