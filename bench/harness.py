"""What every benchmark shares: its settings, the machine, rows on disk, and reports.

A benchmark is a `Benchmark`: settings, a function that measures into a `Results`, and a report. The
report is a function of the stored document alone, so `python -m bench report results.json` writes
it again without measuring.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Optional, get_origin

import tyro

from bench.reading import Document, checked, read_document
from mlx_mla import cli, files
from mlx_mla.backends import get_backend
from mlx_mla.errors import UserError, flag
from mlx_mla.fields import Bounds
from mlx_mla.machine import memory, processor
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.pictures import draw

Row = dict[str, Any]
"""A row of most benchmarks, as JSON has it."""
RESULTS, REPORT_FILE = "results.json", "report.md"
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "numpy")
UNFINISHED = 75  # EX_TEMPFAIL: nothing is wrong, call again

REGISTRY = {
    "compare": ("compare_backends", "MLX and PyTorch side by side, MLA against GPT-2"),
    "core": ("compare_backends", "the training step, decoding by cache, and saving, in MLX"),
    "decode": ("compare_backends", "decoding by kind of cache, batch and context"),
    "trained": ("trained", "what quantisation costs trained models, what a draft model gains"),
    "training": ("training", "memory of a training step against the estimate; largest batches"),
    "convert": ("convert_mla", "what converting a trained model to MLA costs, by rank and method"),
    "evaluation": ("evaluation", "evaluation beside lm-evaluation-harness"),
    "prepare": ("prepare", "preparing data beside tiktoken alone"),
    "serve": ("serve", "mlx_lm.server under many clients"),
    "reduction": ("reduction", "what averaging gradients over processes adds to a step"),
}
"""The module and the subject of each benchmark, by the NAME in `python -m bench NAME`."""


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Flags that every benchmark has."""

    out: Optional[Path] = None
    """Folder for results.json, report.md and pictures. None: only print."""

    packages: ClassVar[Sequence[str]] = PACKAGES
    """Packages whose versions the report lists."""
    bounds: ClassVar[Mapping[str, Bounds]] = {}
    """Values that numeric fields may have."""
    devices: ClassVar[Mapping[BackendName, DeviceName]] = {}
    """Frameworks that are measured, each with its --device. A property where flags choose them."""

    def checked(self) -> "Settings":
        """The settings to use; UserError for a value out of its bounds or an empty list."""
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if values == ():
                raise UserError(f"{flag(field.name)} needs at least one value")
            limit = self.bounds.get(field.name)
            for value in values if isinstance(values, tuple) else (values,):
                if limit and value is not None and (problem := limit.problem(value)):
                    raise UserError(f"{flag(field.name)} {problem}")
        return self


@dataclasses.dataclass(kw_only=True)
class Resumable(Settings):
    """Flags of benchmarks that take hours."""

    resume: bool = False
    """Keep the rows that --out has, and measure the rest."""
    minutes: Optional[float] = None
    """Start no measurement after this many minutes; the exit code is then 75. None: no limit."""

    same: ClassVar[Sequence[str]] = ()
    """Settings that all rows of one file share."""

    def checked(self) -> "Resumable":
        super().checked()
        if self.minutes is not None and self.minutes <= 0:
            raise UserError("--minutes must be above 0")
        for name in ("resume", "minutes"):
            if getattr(self, name) and self.out is None:
                raise UserError(f"--{name} needs --out, the folder with the rows to keep")
        return self


class Picture(NamedTuple):
    """What paints a figure, and the figure's size in inches."""

    paint: Callable[[Any], None]
    size: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is measured, and how it is reported."""

    name: str
    """NAME in `python -m bench NAME`."""
    title: str
    """Heading of the report."""
    settings: type[Settings]
    measure: Callable[[Any, "Results"], None]
    """Measures by the settings, and adds rows."""
    parts: Mapping[str, Any]
    """The values of the document that the report reads: their types by name."""
    body: Callable[[Document, Mapping[str, str]], list[str]]
    """Lines of Markdown from the document and the files of its pictures."""
    figures: Callable[[Document], Mapping[str, Picture]] = lambda _: {}
    """Pictures by name."""


class OutOfTime(Exception):
    """--minutes have passed, and something is left to measure."""


class Results:
    """The rows of a run and the facts about it, on disk after every change.

    Raises:
        UserError: If --out has results and --resume is not given, or if they are from another
            machine, measured with other settings, or damaged.
    """

    def __init__(self, benchmark: Benchmark, settings: Any, command: str):
        self.path: Path | None = settings.out and settings.out / RESULTS
        self._benchmark = benchmark
        minutes = getattr(settings, "minutes", None)
        self._ends = minutes and time.monotonic() + 60 * minutes
        self.document: Document = {
            "benchmark": benchmark.name,
            "command": command,
            "machine": machine(settings.devices, settings.packages),
            "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        }
        self.document |= {k: [] for k, kind in benchmark.parts.items() if get_origin(kind) is list}
        if self.path and self.path.exists():
            if not getattr(settings, "resume", False):
                hint = "add --resume to complete them, or " if hasattr(settings, "resume") else ""
                raise UserError(f"{settings.out}: holds results; {hint}give --out a new name")
            self._take_over(self.path, settings.same)

    def _take_over(self, path: Path, same: Sequence[str]) -> None:
        benchmark, stored = read(path)
        elsewhere = "give --out a new name"
        if benchmark.name != self._benchmark.name:
            raise UserError(f"{path}: results of another benchmark; {elsewhere}")
        for key, value in self.document["machine"].items():
            if stored["machine"].get(key, value) != value:
                raise UserError(f"{path}: measured with another {key}; {elsewhere}")
        for key in same:
            if (before := stored["settings"][key]) != (now := self.document["settings"][key]):
                raise UserError(f"{path}: measured with {key} {before}, not {now}; {elsewhere}")
        self.document |= {k: stored[k] for k in self._benchmark.parts if k in stored}

    def has(self, part: str = "rows", /, **key: Any) -> bool:
        """Whether a row of a list of the document has these values."""
        rows = (row if isinstance(row, dict) else vars(row) for row in self.document[part])
        return any(all(row[k] == v for k, v in key.items()) for row in rows)

    def begin(self) -> None:
        """Call before each measurement: raises OutOfTime after --minutes."""
        if self._ends and time.monotonic() > self._ends:
            raise OutOfTime

    def add(self, *rows: Any, to: str = "rows", **facts: Any) -> None:
        """Add rows to a list of the document, set facts, and save."""
        if rows:
            self.document[to].extend(rows)
        self.document |= facts
        self.save()

    def save(self) -> None:
        """Replace the file; UserError if it cannot be written."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"{self.path.parent}: cannot be made: {e.strerror}; give another --out"
            ) from e
        text = json.dumps(self.document, indent=1, default=dataclasses.asdict, allow_nan=False)
        files.write_text(self.path, text + "\n")


def run(benchmark: Benchmark, argv: Sequence[str], prog: str = "") -> int:
    """Measure, print the report, and write it with --out; returns the exit code."""
    prog = prog or f"python -m bench {benchmark.name}"
    settings = cli.parse(benchmark.settings, argv, prog).checked()
    results = Results(benchmark, settings, f"{prog} {shlex.join(argv)}".rstrip())
    code = 0
    try:
        benchmark.measure(settings, results)
    except OutOfTime:
        code = UNFINISHED
    results.save()
    print(markdown(benchmark, results.document, {}))
    if results.path:
        write_report(benchmark, results.document, results.path)
    if code:
        print("--minutes are over: the same command with --resume continues", file=sys.stderr)
    return code


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def machine(
    devices: Mapping[BackendName, DeviceName], packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """What figures depend on.

    Args:
        devices: Frameworks that are measured, each with the value of its --device.
        packages: Packages whose versions matter.
    """
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": memory(),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "as the libraries choose"),
    }
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    for backend, device in devices.items():
        found |= get_backend(backend, device).device_info()
    return found


def find(name: str) -> Benchmark:
    """A registered benchmark. UserError if a package that it needs is missing."""
    try:
        module = importlib.import_module(f"bench.{REGISTRY[name][0]}")
    except ModuleNotFoundError as e:
        raise UserError(f"{name} needs {e.name}; pip install {e.name}") from None
    return next(b for b in module.BENCHMARKS if b.name == name)


def read(path: Path) -> tuple[Benchmark, Document]:
    """A stored document with typed rows, and its benchmark; UserError if it is none."""
    document = read_document(path)
    name = document.get("benchmark")
    if not isinstance(name, str) or name not in REGISTRY or name == "reduction":
        raise UserError(f"{path}: does not name its benchmark; measure it again")
    benchmark = find(name)
    return benchmark, checked(document, benchmark.parts, benchmark.settings, path)


def markdown(benchmark: Benchmark, document: Document, pictures: Mapping[str, str]) -> str:
    """The report's text: the heading, the machine, the command, and what was measured."""
    lines = [f"# {benchmark.title}", ""]
    lines += [f"- {key}: {value}" for key, value in document["machine"].items()]
    if "command" in document:
        lines.append(f"- command: `{document['command']}`")
    return "\n".join([*lines, *benchmark.body(document, pictures)]).rstrip() + "\n"


def write_report(benchmark: Benchmark, document: Document, path: Path) -> None:
    """Write the report and the pictures of a document that is on disk as `path`."""
    alone = path.name == RESULTS
    pictures = {}
    for name, picture in benchmark.figures(document).items():
        pictures[name] = f"{name}.png" if alone else f"{path.stem}-{name}.png"
        draw(path.with_name(pictures[name]), picture.paint, figsize=picture.size)
    text = path.with_name(REPORT_FILE) if alone else path.with_suffix(".md")
    files.write_text(text, markdown(benchmark, document, pictures))


@dataclasses.dataclass(kw_only=True)
class ReportCommand:
    """Write the reports and the pictures of stored results again, without measuring."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files that benchmarks have written."""


def report(argv: Sequence[str]) -> int:
    """`python -m bench report`: reads all the files before it writes anything."""
    command = cli.parse(ReportCommand, argv, "python -m bench report")
    for path, found in [(path, read(path)) for path in command.results]:
        write_report(*found, path)
        print(f"written: {path}")
    return 0
