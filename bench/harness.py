"""What every benchmark shares: the machine, turns and medians, and the one writer of reports.

    python -m bench.harness bench/results/NAME.json ...     # write NAME.md and pictures anew

A benchmark is a module with a `REPORT`. What it has measured is a document, plain values that go
into NAME.json; the report's text and pictures are functions of the document alone, so that they can
be written anew without measuring.
"""

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mlx_mla import cli, files
from mlx_mla.backends import get_backend
from mlx_mla.errors import UserError
from mlx_mla.machine import memory, processor
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.pictures import save

PROG = "python -m bench.harness"
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "numpy")
RESULTS, REPORT_FILE = "results.json", "report.md"

Row = dict[str, Any]
"""One measurement of one subject."""
Document = dict[str, Any]
"""What a benchmark has measured: `report` (its module), `command`, `machine`, `settings`, and
what its report reads."""


def _no_figures(document: Document) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Report:
    """How a benchmark's document is shown.

    Attributes:
        kind: Word at the end of the files' names.
        title: Heading.
        body: Lines of Markdown after the machine's, from the document and the files of its
            pictures.
        figures: matplotlib figures by name; one that has the report's kind as its name is NAME.png.
    """

    kind: str
    title: str
    body: Callable[[Document, Mapping[str, str]], list[str]]
    figures: Callable[[Document], dict[str, Any]] = _no_figures


def machine(
    devices: Mapping[BackendName, DeviceName], packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """What figures depend on, and that can be told.

    Args:
        devices: Frameworks that were measured, each with the value of its --device.
        packages: Packages whose versions matter.
    """
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
    for backend, device in devices.items():
        facts |= get_backend(backend, device).device_info()
    return facts


def report_name(kind: str) -> str:
    """Name of a report: the processor, the date and the kind of report."""
    words = (
        "".join(c if c.isalnum() else " " for c in processor().replace("(R)", "")).lower().split()
    )
    return f"{'-'.join(words)}-{os.cpu_count()}cores_{datetime.date.today().isoformat()}_{kind}"


def take_turns(
    actions: Mapping[str, Callable[[], float]], repetitions: int
) -> dict[str, list[float]]:
    """Run every action once unmeasured, then `repetitions` rounds of all; returns what each
    returned."""
    for action in actions.values():
        action()
    results: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repetitions):
        for name, action in actions.items():
            results[name].append(action())
    return results


def row(what: str, name: str, case: str, unit: str, values: Sequence[float], **more: Any) -> Row:
    """A row of repeated measurements: median, smallest and largest."""
    return {
        "what": what,
        "preset": name,
        "case": case,
        "unit": unit,
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
        **more,
    }


def document(
    module: str,
    prog: str,
    argv: Sequence[str],
    settings: Any,
    devices: Mapping[BackendName, DeviceName],
    packages: Sequence[str] = PACKAGES,
    **measured: Any,
) -> Document:
    """What a benchmark measured, with how and where.

    Args:
        module: Where its `REPORT` is, `bench.core` for example.
        prog: How it is started.
        argv: Its arguments.
        settings: Its command's dataclass.
        devices: Frameworks that were measured, each with the value of its --device.
        packages: Packages whose versions matter.
        measured: What its report reads.
    """
    plain = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    return {
        "report": module,
        "command": f"{prog} {shlex.join(argv)}".rstrip(),
        "machine": machine(devices, packages),
        "settings": plain,
        **measured,
    }


def markdown(report: Report, document: Document, pictures: Mapping[str, str]) -> str:
    """The report's text: the heading, the machine, the command, and what was measured."""
    lines = [f"# {report.title}", ""]
    lines += [f"- {key}: {value}" for key, value in document["machine"].items()]
    if "command" in document:
        lines.append(f"- command: `{document['command']}`")
    return "\n".join([*lines, *report.body(document, pictures)]).rstrip() + "\n"


def publish(report: Report, document: Document, out: Path | None) -> None:
    """Print a report; with `out`, also write NAME.json, NAME.md and pictures into that folder."""
    print(markdown(report, document, {}))
    if out is not None:
        path = out / f"{report_name(report.kind)}.json"
        write(report, document, path)
        print(f"written: {path.with_suffix('')}.*")


def write(report: Report, document: Document, path: Path) -> None:
    """Write a document, its report and its pictures.

    Args:
        path: NAME.json, beside which NAME.md and NAME.png come; or results.json of a folder of its
            own, beside which are report.md and a file a picture.

    Raises:
        UserError: If the folder or a file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path.parent}: cannot be made: {e.strerror}; give another --out") from e
    files.write_text(path, json.dumps(document, indent=1, default=str) + "\n")
    rewrite(report, document, path)


def rewrite(report: Report, document: Document, path: Path) -> None:
    """Write report and pictures of a document that is on disk."""
    alone = path.name == RESULTS
    prefix = "" if alone else path.stem.removesuffix(report.kind)
    pictures = {}
    for name, figure in report.figures(document).items():
        pictures[name] = f"{prefix}{name}.png"
        save_figure(figure, path.with_name(pictures[name]))
    text = path.with_name(REPORT_FILE) if alone else path.with_suffix(".md")
    files.write_text(text, markdown(report, document, pictures))


def save_figure(figure: Any, path: Path) -> None:
    """Replace a picture in one step; UserError if it cannot be written."""
    try:
        save(figure, path)
    except OSError as e:
        raise UserError(f"{path}: could not be written: {e.strerror or e}") from e


@dataclasses.dataclass(kw_only=True)
class HarnessCommand:
    """Write the text and the pictures of stored results anew; measures nothing."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files that benchmarks have written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(HarnessCommand, argv, PROG)
    for path in command.results:
        stored = read(path)
        rewrite(report_of(stored, path), stored, path)
        print(f"written: {path}")
    return 0


def read(path: Path) -> Document:
    """A stored document; UserError if it is none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored["machine"], dict):
            raise TypeError
        return stored
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not results of a benchmark") from None


def report_of(document: Document, path: Path) -> Report:
    """The report that a stored document is shown by."""
    module = document.get("report")
    if not (isinstance(module, str) and module.startswith("bench.")):
        raise UserError(f"{path}: does not name its benchmark; measure it again")
    try:
        report: Report = importlib.import_module(module).REPORT
    except ModuleNotFoundError as e:
        raise UserError(f"{path}: {module} needs {e.name}; pip install {e.name}") from None
    return report


if __name__ == "__main__":
    sys.exit(main())
