"""What every benchmark shares: its flags, the machine, rows on disk, and reports.

A benchmark is a subclass of `Benchmark`: a dataclass of flags, with a method that measures into
`Results`. Its report is a function of the stored document alone, so `python -m bench report
results.json` writes it again without measuring.
"""

import dataclasses
import importlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Optional, Self, get_args, get_origin

import tyro

from mlx_mla import cli, files
from mlx_mla.backends import get_backend
from mlx_mla.errors import UserError, flag
from mlx_mla.fields import check_bounds, value_of
from mlx_mla.machine import memory, processor, version
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.pictures import draw

Document = dict[str, Any]
"""What a benchmark has measured: `benchmark` (its name), `command`, `machine`, `settings`, and the
lists of rows and other values that its report reads."""
Row = dict[str, Any]
"""A row of most benchmarks, as in JSON."""
RESULTS, REPORT_FILE = "results.json", "report.md"
REMEDY = "measure again"
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "numpy")
UNFINISHED = 75  # EX_TEMPFAIL: nothing is wrong, call again

REGISTRY = {
    "compare": ("compare_backends", "MLX and PyTorch side by side, MLA against GPT-2"),
    "core": ("compare_backends", "the training step, decoding by cache, and saving, in MLX"),
    "decode": ("compare_backends", "decoding by kind of cache, batch and context"),
    "trained": ("trained", "what quantization costs trained models, what a draft model gains"),
    "training": ("training", "memory of a training step against the estimate; largest batches"),
    "convert": ("convert_mla", "what converting a trained model to MLA costs, by rank"),
    "evaluation": ("evaluation", "evaluation beside lm-evaluation-harness"),
    "reduction": ("reduction", "what averaging gradients over processes adds to a step"),
}
"""The module and the subject of each benchmark, by the NAME in `python -m bench NAME`."""


class Picture(NamedTuple):
    """The function that paints a figure, and the figure's size in inches."""

    paint: Callable[[Any], None]
    size: tuple[float, float]


@dataclasses.dataclass(kw_only=True)
class Benchmark:
    """The flags that every benchmark has, and what a benchmark defines."""

    out: Optional[Path] = None
    """Folder for results.json, report.md and pictures. None: only print."""

    name: ClassVar[str] = ""
    """NAME in `python -m bench NAME`."""
    title: ClassVar[str]
    """Heading of the report."""
    stored: ClassVar[Mapping[str, Any]]
    """The values of the document that the report reads: their types by name."""
    packages: ClassVar[Sequence[str]] = PACKAGES
    """Packages whose versions the report lists."""
    devices: ClassVar[Mapping[BackendName, DeviceName]] = {}
    """Frameworks that are measured, each with its --device. A property where flags choose them."""

    def checked(self) -> Self:
        """The flags to use; UserError for a value out of its bounds or an empty list."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == ():
                raise UserError(f"{flag(field.name)} needs at least one value")
        check_bounds(self)
        return self

    def measure(self, results: "Results") -> None:
        """Measure, and add rows."""
        raise NotImplementedError

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        """Lines of Markdown from the document and the files of its pictures."""
        raise NotImplementedError

    @staticmethod
    def figures(found: Document) -> Mapping[str, Picture]:
        """Pictures of the document by name."""
        return {}


@dataclasses.dataclass(kw_only=True)
class Resumable(Benchmark):
    """Flags of benchmarks that take hours."""

    resume: bool = False
    """Keep the rows that --out has, and measure the rest."""
    minutes: Optional[float] = None
    """Start no measurement after this many minutes; the exit code is then 75. None: no limit."""

    same: ClassVar[Sequence[str]] = ()
    """Flags whose values all rows of one file share."""

    def checked(self) -> Self:
        if self.minutes is not None and self.minutes <= 0:
            raise UserError("--minutes must be above 0")
        for name in ("resume", "minutes"):
            if getattr(self, name) and self.out is None:
                raise UserError(f"--{name} needs --out, the folder with the rows to keep")
        return super().checked()


class OutOfTime(Exception):
    """--minutes have passed, and something is left to measure."""


class Results:
    """The rows of a run and the facts about it, on disk after every change.

    Raises:
        UserError: If --out has results and --resume is not given, or if they are from another
            machine, measured with other settings, or damaged.
    """

    def __init__(self, benchmark: Benchmark, command: str):
        self.path = benchmark.out and benchmark.out / RESULTS
        minutes = getattr(benchmark, "minutes", None)
        self._ends = minutes and time.monotonic() + 60 * minutes
        lists = [k for k, kind in benchmark.stored.items() if get_origin(kind) is list]
        self.document: Document = {
            "benchmark": benchmark.name,
            "command": command,
            "machine": machine(benchmark.devices, benchmark.packages),
            "settings": json.loads(json.dumps(dataclasses.asdict(benchmark), default=str)),
            **{name: [] for name in lists},
        }
        if self.path and self.path.exists():
            if not getattr(benchmark, "resume", False):
                hint = "add --resume to complete them, or " if hasattr(benchmark, "resume") else ""
                raise UserError(f"{benchmark.out}: holds results; {hint}give --out a new name")
            self._take_over(self.path, benchmark)

    def _take_over(self, path: Path, benchmark: Any) -> None:
        found, stored = read(path)
        elsewhere = "give --out a new name"
        if found.name != benchmark.name:
            raise UserError(f"{path}: results of another benchmark; {elsewhere}")
        for key, value in self.document["machine"].items():
            if stored["machine"].get(key, value) != value:
                raise UserError(f"{path}: measured with another {key}; {elsewhere}")
        for key in benchmark.same:
            if (before := stored["settings"][key]) != (now := self.document["settings"][key]):
                raise UserError(f"{path}: measured with {key} {before}, not {now}; {elsewhere}")
        self.document |= {k: stored[k] for k in benchmark.stored if k in stored}

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


def run(kind: type[Benchmark], argv: Sequence[str], prog: str = "") -> int:
    """Measure, print the report, and write it with --out; returns the exit code."""
    prog = prog or f"python -m bench {kind.name}"
    benchmark = cli.parse(kind, argv, prog).checked()
    results = Results(benchmark, f"{prog} {shlex.join(argv)}".rstrip())
    code = 0
    try:
        benchmark.measure(results)
    except OutOfTime:
        code = UNFINISHED
    results.save()
    print(markdown(kind, results.document, {}))
    if results.path:
        write_report(kind, results.document, results.path)
    if code:
        print("--minutes are over: the same command with --resume continues", file=sys.stderr)
    return code


def machine(
    devices: Mapping[BackendName, DeviceName], packages: Sequence[str] = PACKAGES
) -> dict[str, str]:
    """Facts about this machine that figures depend on.

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
    found |= {package: version(package) for package in packages}
    for backend, device in devices.items():
        found |= get_backend(backend, device).device_info()
    return found


def find(name: str) -> type[Benchmark]:
    """The class of a registered benchmark. UserError if a package that it needs is missing."""
    try:
        module = importlib.import_module(f"bench.{REGISTRY[name][0]}")
    except ModuleNotFoundError as e:
        raise UserError(f"{name} needs {e.name}; pip install {e.name}") from None
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type))
    return next(kind for kind in kinds if issubclass(kind, Benchmark) and kind.name == name)


class Stored(dict[str, Any]):
    """An object of a stored document; a missing value raises a UserError."""

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._where}: {key} is missing; {REMEDY}")


def read(path: Path) -> tuple[type[Benchmark], Document]:
    """The benchmark of a stored document, and the document with its parts and settings typed.

    Raises:
        UserError: If the file holds no results, or a damaged value; the message names it.
    """
    stored = files.read_json(path)
    tables = ("machine", "settings")
    if not all(isinstance(stored.get(k), dict) for k in tables):
        raise UserError(f"{path}: not results of a benchmark")
    name = stored.get("benchmark")
    if not isinstance(name, str) or name not in REGISTRY or name == "reduction":
        raise UserError(f"{path}: does not name its benchmark; measure it again")
    kind = find(name)
    for part in (part for part in kind.stored if part in stored):
        stored[part] = value_of(kind.stored[part], stored[part], str(path), REMEDY, at=part)
    settings = Stored(stored["settings"], f"{path}: settings")
    for field in (field for field in dataclasses.fields(kind) if field.name in settings):
        value, of = settings[field.name], field.type
        if get_origin(of) is tuple or Path in (of, *get_args(of)):
            continue  # no report reads lists or paths
        at = f"settings.{field.name}"
        settings[field.name] = value_of(of, value, str(path), REMEDY, at=at)
    return kind, Stored({**stored, "settings": settings}, str(path))


def markdown(kind: type[Benchmark], document: Document, pictures: Mapping[str, str]) -> str:
    """The report's text: the heading, the machine, the command, and what was measured."""
    lines = [f"# {kind.title}", ""]
    lines += [f"- {key}: {value}" for key, value in document["machine"].items()]
    if "command" in document:
        lines.append(f"- command: `{document['command']}`")
    return "\n".join([*lines, *kind.body(document, pictures)]).rstrip() + "\n"


def write_report(kind: type[Benchmark], document: Document, path: Path) -> None:
    """Write the report and the pictures of a document that is on disk as `path`."""
    alone = path.name == RESULTS
    pictures = {}
    for name, picture in kind.figures(document).items():
        pictures[name] = f"{name}.png" if alone else f"{path.stem}-{name}.png"
        draw(path.with_name(pictures[name]), picture.paint, figsize=picture.size)
    text = path.with_name(REPORT_FILE) if alone else path.with_suffix(".md")
    files.write_text(text, markdown(kind, document, pictures))


@dataclasses.dataclass(kw_only=True)
class ReportCommand:
    """Write the reports and the pictures of stored results again, without measuring."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """JSON files that benchmarks have written."""


def report(argv: Sequence[str]) -> int:
    """`python -m bench report`: reads all the files before it writes anything."""
    command = cli.parse(ReportCommand, argv, "python -m bench report")
    if not command.results:
        raise UserError("give the JSON files that benchmarks have written")
    for path, found in [(path, read(path)) for path in command.results]:
        write_report(*found, path)
        print(f"written: {path}")
    return 0
