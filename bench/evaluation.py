"""Measure evaluation: items per second of HellaSwag and LAMBADA against lm-evaluation-harness.

    python -m bench.evaluation --data-dir DIR [--limit 64] [--out bench/results]

Both read the same items of the same model folder in batches of the same size on the same device,
and take turns. HellaSwag is timed without its completion form, which `evaluate` also scores and
lm_eval does not. Timed is all but loading the model: reading and tokenising the items, scoring,
metrics. The scores of all are set beside each other, since only equal work may be compared.

The target is 1.9x of lm_eval in PyTorch on both tasks, and in MLX the share of its own forward
speed that PyTorch reaches. That share is of the items' tokens a second, shared ones once and
without padding, in those of a plain pass of the same model, timed beside it.

Memory is the process's resident memory, by half of the run: it is flat if the second half needs no
more than the first. Prints a table; writes NAME.json and NAME.md.
"""

import contextlib
import dataclasses
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import psutil
from lm_eval.models.huggingface import HFLM

from bench import referee
from bench.harness import PACKAGES, Document, Report, Row, document, publish
from mlx_mla import checkpoint, cli
from mlx_mla.backends import get_backend
from mlx_mla.backends.torch.backend import TorchBackend
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.errors import UserError
from mlx_mla.evaluation.runner import PreparedTask, load, metrics, task_names, task_setup
from mlx_mla.evaluation.scoring import Request, RowBatch, Scorer, Scores
from mlx_mla.evaluation.tasks import TASKS
from mlx_mla.evaluation.tasks.base import Definition, Measured, TaskSetup
from mlx_mla.evaluation.tasks.hellaswag import HellaSwag
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights

PROG = "python -m bench.evaluation"
WARM_UP = 4
TARGET = 1.9
FORWARD = (8, 128)
"""Rows and tokens of the plain forward pass, about those of a pass of the tasks."""


class AccuracyAlone(HellaSwag):
    """HellaSwag as lm_eval scores it, so that both do the same work."""

    def requests(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ) -> list[list[Request]]:
        return [own[:1] for own in super().requests(documents, protocol, setup)]

    def measure(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup,
        requests: Sequence[Sequence[Request]], scores: Sequence[Sequence[Scores]],
    ) -> list[Measured]:  # fmt: skip
        # The original protocol, too, has one form alone, and its accuracy is by summed
        # log-probability as well.
        return super().measure(documents, "original", setup, requests, scores)[:1]


TIMED = {**TASKS, "hellaswag": AccuracyAlone()}
REFEREE = "lm_eval hf"


@dataclasses.dataclass(kw_only=True)
class EvaluationBench:
    """Time HellaSwag and LAMBADA against lm-evaluation-harness on one model."""

    data_dir: Path
    """Folder with lambada/lambada_test.jsonl and hellaswag/hellaswag_val.jsonl."""
    model: str = "mla-124m"
    """A model folder, or a preset, whose weights are then random."""
    bpe_dir: Optional[str] = None
    """Folder with encoder.json and vocab.bpe, for a preset. None: tiktoken downloads them once."""
    tasks: str = "hellaswag,lambada"
    """Tasks, separated by commas."""
    backends: tuple[Literal["mlx", "torch"], ...] = ("mlx", "torch")
    """Our backends to time."""
    device: Literal["auto", "cpu", "mps", "cuda"] = "auto"
    """Device of PyTorch, in both. MLX takes its default."""
    batch_size: int = 32
    """Rows scored at once, in all."""
    limit: Optional[int] = None
    """A random sample of so many items. None: all."""
    repetitions: int = 1
    """Rounds of all."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""

    @property
    def devices(self) -> dict[BackendName, DeviceName]:
        """Our backends, with the value of the --device that each is given."""
        return {name: self.device if name == "torch" else "auto" for name in self.backends}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    bench = cli.parse(EvaluationBench, argv, PROG)
    names = task_names(bench.tasks)
    if "wikitext2" in names:
        raise UserError(
            "--tasks: wikitext2 has too few items to be timed by item; take hellaswag or lambada"
        )
    if min(bench.batch_size, bench.repetitions, 1 if bench.limit is None else bench.limit) < 1:
        raise UserError("--batch-size, --repetitions and --limit must be at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(bench, names, Path(temporary))
    packages = (*PACKAGES, "lm_eval")
    found = document("bench.evaluation", PROG, argv, bench, bench.devices, packages, rows=rows)
    publish(REPORT, found, bench.out)
    return 0


def measure(bench: EvaluationBench, names: Sequence[str], temporary: Path) -> list[Row]:
    """A row of each task and subject."""
    folder = model_folder(bench, temporary)
    data = {name: sample(bench, name, temporary) for name in names}
    scorers: dict[str, Scorer] = {
        name: get_backend(name, device).scorer(folder, "float32")
        for name, device in bench.devices.items()
    }
    theirs = HFLM(
        pretrained=str(folder),
        trust_remote_code=True,
        dtype="float32",
        device=str(TorchBackend(bench.device).device),
        batch_size=bench.batch_size,
    )
    (temporary / "tasks").mkdir()
    files = {name: data[name] / TASKS[name].files["standard"] for name in names}
    referees = referee.local_tasks(files, temporary / "tasks")

    def ours(backend: str, name: str, limit: int | None = None) -> dict[str, float]:
        scorer = scorers[backend]
        documents = load(TIMED[name], "standard", data[name], None, 0)[:limit]
        setup = task_setup(scorer.tokenizer, scorer.n_positions, 1024, None, 0)
        return metrics(
            PreparedTask(TIMED[name], documents, "standard", setup).run(scorer, bench.batch_size)
        )

    rows = []
    for name in names:
        subjects: dict[str, Callable[..., dict[str, float]]] = {
            REFEREE: lambda limit=None, name=name: referee.evaluate(
                theirs, referees, name, bench.batch_size, limit
            )
        }
        for b in bench.backends:
            subjects[f"mlx_mla {b}"] = lambda limit=None, b=b, name=name: ours(b, name, limit)
        items = sum(
            1 for line in files[name].read_text(encoding="utf-8").splitlines() if line.strip()
        )
        for run in subjects.values():
            run(limit=WARM_UP)
        found: dict[str, dict[str, Any]] = {s: {"seconds": [], "memory": []} for s in subjects}
        for _ in range(bench.repetitions):
            for subject, run in subjects.items():
                with watched() as figures:
                    scores = run()
                found[subject]["seconds"].append(figures["seconds"])
                found[subject]["memory"].append([figures["first_half"], figures["second_half"]])
                found[subject]["acc"] = scores["acc"]
            for b in bench.backends:
                found[f"mlx_mla {b}"].setdefault("forward", []).append(forward_rate(scorers[b]))
        tokens = {
            f"mlx_mla {b}": needed_tokens(scorers[b], name, data[name]) for b in bench.backends
        }
        for subject, f in found.items():
            if subject in tokens:
                f["tokens"] = tokens[subject]
            rate = items / statistics.median(f["seconds"])
            rows.append(
                {"task": name, "subject": subject, "items": items, "items_per_second": rate, **f}
            )
    return rows


def needed_tokens(scorer: Scorer, name: str, data: Path) -> int:
    """Tokens that a task's items need at least: what an item's continuations share once, without
    padding."""
    documents = load(TIMED[name], "standard", data, None, 0)
    setup = task_setup(scorer.tokenizer, scorer.n_positions, 1024, None, 0)
    own = TIMED[name].requests(documents, "standard", setup)
    requests = [request for requests in own for request in requests]
    return sum(
        len(r.context) - 1 + sum(len(target) for target in r.targets)
        if len(r.targets) > 1
        else len(r.context) + len(r.targets[0]) - 1
        for r in requests
    )


def forward_rate(scorer: Scorer) -> float:
    """Tokens per second of a plain pass, the best of three after a warm-up."""
    rows, length = FORWARD
    ids = np.random.default_rng(0).integers(0, len(scorer.tokenizer), FORWARD).astype(np.int32)
    last = np.arange(1, rows + 1, dtype=np.int32) * length - 1
    block = RowBatch(ids, np.arange(rows), last, ids[:, 0])
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        scorer.run(None, [block])
        seconds.append(time.perf_counter() - began)
    return ids.size / min(seconds[1:])


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds, and the most resident bytes in either half of the time, of what runs inside."""
    process, figures, samples = psutil.Process(), dict[str, float](), list[tuple[float, int]]()
    stop, began = threading.Event(), time.perf_counter()

    def look() -> None:
        while not stop.wait(0.1):
            samples.append((time.perf_counter() - began, process.memory_info().rss))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield figures
    finally:
        figures["seconds"] = seconds = time.perf_counter() - began
        stop.set()
        thread.join()
        for name, half in (
            ("first_half", (0, seconds / 2)),
            ("second_half", (seconds / 2, seconds)),
        ):
            figures[name] = max((rss for t, rss in samples if half[0] <= t <= half[1]), default=0)


def model_folder(bench: EvaluationBench, temporary: Path) -> Path:
    """The folder of --model; a preset's is written with random weights."""
    if bench.model not in PRESETS:
        return checkpoint.model_folder(Path(bench.model))
    tokenizer = get_tokenizer("gpt2", bench.bpe_dir)
    config = preset(bench.model)
    if config.tokenizer != "gpt2":
        raise UserError(f"--model {bench.model}: the tasks need a preset with --tokenizer gpt2")
    model = config.resolved().model
    folder = temporary / bench.model
    folder.mkdir()
    checkpoint.write_model(
        folder, model, initial_weights(model, 0, 0.02), tokenizer.fast_tokenizer(), ""
    )
    return folder


def sample(bench: EvaluationBench, name: str, temporary: Path) -> Path:
    """A data folder with the items of --limit."""
    path = TASKS[name].files["standard"]
    if bench.limit is None:
        return bench.data_dir.resolve()
    lines = (bench.data_dir / path).read_text(encoding="utf-8").splitlines()
    chosen = np.random.default_rng(0).choice(
        len(lines), min(bench.limit, len(lines)), replace=False
    )
    folder = temporary / "data"
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text("".join(lines[i] + "\n" for i in sorted(chosen)), encoding="utf-8")
    return folder


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """The table."""
    rows: list[Row] = found["rows"]
    bench = found["settings"]
    lines = [
        f"- {bench['model']}, float32, batches of {bench['batch_size']} rows, median of "
        f"{bench['repetitions']}",
        f"- target: PyTorch at least {TARGET}x of lm_eval; MLX at least PyTorch's share of the "
        "forward speed", "",
        "| task | subject | items | items/s | against lm_eval | of its forward speed | accuracy "
        "| memory, first half | second half |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    reference = {r["task"]: r["items_per_second"] for r in rows if r["subject"] == REFEREE}
    for r in rows:
        first, second = (f"{statistics.median(m) / 2**20:,.0f} MiB" for m in zip(*r["memory"]))
        lines.append(
            f"| {r['task']} | {r['subject']} | {r['items']:,} | {r['items_per_second']:.2f} "
            f"| {r['items_per_second'] / reference[r['task']]:.2f}x | {_share(r)} "
            f"| {r['acc']:.4f} | {first} | {second} |"
        )
    return lines


def _share(r: Row) -> str:
    if "forward" not in r:
        return "-"
    rate = r["tokens"] / statistics.median(r["seconds"])
    return f"{rate / statistics.median(r['forward']):.0%}"


REPORT = Report("evaluation", "Evaluation beside lm_eval", body)


if __name__ == "__main__":
    sys.exit(main())
