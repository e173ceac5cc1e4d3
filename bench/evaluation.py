"""Measure evaluation: items per second of HellaSwag and LAMBADA against lm-evaluation-harness.

    python -m bench evaluation --data-dir DIR [--limit 64] [--out DIR]

Both read the same items of the same model folder in batches of the same size on the same device,
and take turns. HellaSwag is timed without its completion form, which `evaluate` also scores and
lm_eval does not. Timed is all but loading the model: reading and tokenizing the items, scoring,
metrics. The scores of all are set beside each other, since only equal work may be compared.

The target is 1.9x of lm_eval in PyTorch on both tasks, and in MLX the share of its own forward
speed that PyTorch reaches. That share is of the items' tokens a second, shared ones once and
without padding, in those of a plain pass of the same model, timed beside it.

Memory is the process's resident memory, by half of the run: it is flat if the second half needs no
more than the first.
"""

import dataclasses
import functools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NotRequired, Optional, Self

import lm_eval
import numpy as np
import psutil
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bench.harness import PACKAGES, Benchmark, Document, Results, Row
from bench.rows import Figure, Positive, Positives, Whole, rows
from bench.subjects.contract import seconds
from bench.timing import turns
from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.torch.backend import TorchBackend
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.display import markdown_table
from mlx_mla.errors import UserError
from mlx_mla.evaluation.runner import PreparedTask, load, metrics, task_names
from mlx_mla.evaluation.scoring import Request, RowBatch, Scorer, Scores
from mlx_mla.evaluation.tasks import TASKS
from mlx_mla.evaluation.tasks.base import Definition, Measured, TaskSetup
from mlx_mla.evaluation.tasks.hellaswag import HellaSwag
from mlx_mla.fields import PositiveInt
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights

WARM_UP = 4
TARGET = 1.9
FORWARD = (8, 128)
"""Rows and tokens of the plain forward pass, about those of a pass of the tasks."""
REFEREE = "lm_eval hf"
YAMLS = {
    "wikitext2": "wikitext/wikitext.yaml",
    "lambada": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
"""lm_eval's definition of each of our tasks."""
ROWS = rows({
    "task": str, "subject": str, "items": Whole, "items_per_second": Positive, "acc": Figure,
    "seconds": Positives, "memory": list[list[Figure]],
    "tokens": NotRequired[Figure], "forward": NotRequired[Positives],
})  # fmt: skip
"""Seconds, memory (bytes by half) and forward (tokens per second of a plain pass) are by round."""


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


@dataclasses.dataclass(kw_only=True)
class Evaluation(Benchmark):
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
    """Device of PyTorch, for lm_eval and for ours. MLX takes its default."""
    batch_size: PositiveInt = 32
    """Rows scored at once, by every subject."""
    limit: Optional[PositiveInt] = None
    """A random sample of so many items. None: all."""
    repetitions: PositiveInt = 1
    """Timed runs of every subject."""

    name = "evaluation"
    title = "Evaluation beside lm_eval"
    stored: ClassVar = {"rows": ROWS}
    packages: ClassVar = (*PACKAGES, "lm_eval")

    @property
    def devices(self) -> dict[BackendName, DeviceName]:  # type: ignore[override]
        return {name: self.device if name == "torch" else "auto" for name in self.backends}

    def checked(self) -> Self:
        super().checked()
        if "wikitext2" in task_names(self.tasks):
            raise UserError(
                "--tasks: wikitext2 has too few items to be timed by item; take hellaswag or "
                "lambada"
            )
        return self

    def measure(self, results: Results) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            folder = model_folder(self, work)
            ours = checkpoint.ModelFolder(folder)
            scorers: dict[str, Scorer] = {
                f"mlx_mla {name}": get_backend(name, device).scorer(ours, "float32")
                for name, device in self.devices.items()
            }
            theirs = HFLM(
                pretrained=str(folder), trust_remote_code=True, dtype="float32",
                device=str(TorchBackend(self.device).device), batch_size=self.batch_size,
            )  # fmt: skip
            for name in task_names(self.tasks):
                results.add(*timed(self, name, scorers, theirs, work / name))

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        rows, s = found["rows"], found["settings"]
        theirs = {r["task"]: r["items_per_second"] for r in rows if r["subject"] == REFEREE}
        lines = []
        for r in rows:
            share = "-"
            if "forward" in r:
                rate = r["tokens"] / statistics.median(r["seconds"])
                share = f"{rate / statistics.median(r['forward']):.0%}"
            halves = (f"{statistics.median(m) / 2**20:,.0f} MiB" for m in zip(*r["memory"]))
            lines.append((
                r["task"], r["subject"], f"{r['items']:,}", f"{r['items_per_second']:.2f}",
                f"{r['items_per_second'] / theirs[r['task']]:.2f}x" if r["task"] in theirs else "-",
                share, f"{r['acc']:.4f}", *halves,
            ))  # fmt: skip
        header = ("task", "subject", "items", "items/s", "against lm_eval", "of its forward speed",
                  "accuracy", "memory, first half", "second half")  # fmt: skip
        return [
            f"- {s['model']}, float32, batches of {s['batch_size']} rows, median of "
            f"{s['repetitions']}",
            f"- target: PyTorch at least {TARGET}x of lm_eval; MLX at least PyTorch's share of the "
            "forward speed",
            "",
            *markdown_table(header, lines),
        ]


def timed(
    bench: Evaluation, name: str, scorers: Mapping[str, Scorer], theirs: HFLM, work: Path
) -> list[Row]:
    """A row of each subject on a task, for which `work` is a folder."""
    data = sample(bench, name, work)
    file = data / TASKS[name].files["standard"]
    referees = local_tasks({name: file}, work)

    def subject(scorer: Scorer | None) -> Callable[..., Any]:
        def run(limit: int | None = None) -> Any:
            if scorer is None:
                return evaluate(theirs, referees, name, bench.batch_size, limit)
            return metrics(prepared(scorer, name, data, limit).run(scorer, bench.batch_size))

        return run

    runs = {REFEREE: subject(None), **{s: subject(scorer) for s, scorer in scorers.items()}}
    for run in runs.values():
        run(limit=WARM_UP)
    actions: dict[str, Callable[[], Any]] = {
        **{s: functools.partial(watched, run) for s, run in runs.items()},
        **{f"{s}: forward": functools.partial(forward_rate, r) for s, r in scorers.items()},
    }
    found = turns(actions, bench.repetitions, warm_up=0)
    items = sum(bool(line.strip()) for line in file.read_text(encoding="utf-8").split("\n"))
    rows = []
    for s in runs:
        scores, times, memory = zip(*found[s])
        row = {
            "task": name, "subject": s, "items": items, "acc": scores[-1]["acc"],
            "items_per_second": items / statistics.median(times), "seconds": list(times),
            "memory": list(memory),
        }  # fmt: skip
        if s in scorers:
            requests = prepared(scorers[s], name, data)._flat
            # What an item needs at least: what its continuations share once, without padding.
            tokens = (len(r.context) - 1 + sum(map(len, r.targets)) for r in requests)
            row |= {"tokens": sum(tokens), "forward": found[f"{s}: forward"]}
        rows.append(row)
    return rows


def local_tasks(files: Mapping[str, Path], folder: Path) -> TaskManager:
    """lm_eval's own tasks, as `local_NAME`, reading local files.

    Args:
        files: JSON-lines file of each task by our name, with the fields that the hub's has.
        folder: Where to write the definitions.
    """
    own = Path(lm_eval.__file__).parent / "tasks"
    for name, data in files.items():
        definition = {
            "include": str(own / YAMLS[name]), "task": f"local_{name}", "dataset_path": "json",
            "dataset_name": None, "training_split": None, "validation_split": None,
            "test_split": "test", "dataset_kwargs": {"data_files": {"test": str(data)}},
        }  # fmt: skip
        text = json.dumps(definition)  # which is YAML, too
        (folder / f"local_{name}.yaml").write_text(text, encoding="utf-8")
    return TaskManager(include_path=str(folder))


def evaluate(
    model: Any, tasks: TaskManager, name: str, batch_size: int, limit: int | None = None
) -> dict[str, float]:
    """lm_eval's metrics of one local task.

    Args:
        model: An `lm_eval.models.huggingface.HFLM`.
        limit: First items only (for warming up).
    """
    outcome = lm_eval.simple_evaluate(
        model=model, tasks=[f"local_{name}"], task_manager=tasks, batch_size=batch_size,
        limit=limit, bootstrap_iters=0,
    )  # fmt: skip
    results: dict[str, Any] = outcome["results"][f"local_{name}"]
    return {k.removesuffix(",none"): v for k, v in results.items() if isinstance(v, float)}


def prepared(scorer: Scorer, name: str, data: Path, limit: int | None = None) -> PreparedTask:
    """A task's items for our own scorers."""
    documents = load(TIMED[name], "standard", data, None, 0)[:limit]
    setup = TaskSetup(scorer.tokenizer, scorer.n_positions, 1024)
    return PreparedTask(TIMED[name], documents, "standard", setup)


def forward_rate(scorer: Scorer) -> float:
    """Tokens per second of a plain pass, the best of three after a warm-up."""
    rows, length = FORWARD
    ids = np.random.default_rng(0).integers(0, len(scorer.tokenizer), FORWARD).astype(np.int32)
    last = np.arange(1, rows + 1, dtype=np.int32) * length - 1
    block = RowBatch(ids, np.arange(rows), last, ids[:, 0])
    return ids.size / min([seconds(lambda: scorer.run(None, [block])) for _ in range(4)][1:])


def watched(work: Callable[[], Any]) -> tuple[Any, float, list[int]]:
    """What a call returns, its seconds, and the most resident bytes in either half of the time."""
    process, stop, samples = psutil.Process(), threading.Event(), list[int]()

    def look() -> None:
        while not stop.wait(0.1):
            samples.append(process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    began = time.perf_counter()
    try:
        outcome = work()
        took = time.perf_counter() - began
    finally:
        stop.set()
        thread.join()
    half = len(samples) // 2
    return outcome, took, [max(own, default=0) for own in (samples[:half], samples[half:])]


def model_folder(bench: Evaluation, temporary: Path) -> Path:
    """The folder of --model; a preset's is written with random weights."""
    if bench.model not in PRESETS:
        return checkpoint.model_folder(Path(bench.model))
    tokenizer = get_tokenizer("gpt2", bench.bpe_dir).fast_tokenizer()
    config = preset(bench.model)
    if config.tokenizer != "gpt2":
        raise UserError(f"--model {bench.model}: the tasks need a preset with --tokenizer gpt2")
    model = config.resolved().model
    folder = temporary / "model"
    folder.mkdir()
    checkpoint.write_model(folder, model, initial_weights(model, 0, 0.02), tokenizer, "")
    return folder


def sample(bench: Evaluation, name: str, work: Path) -> Path:
    """A data folder with the items of --limit."""
    path = TASKS[name].files["standard"]
    (work / path).parent.mkdir(parents=True)
    if bench.limit is None:
        return bench.data_dir.resolve()
    # Other line ends may stand within an item.
    lines = (bench.data_dir / path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    count = min(bench.limit, len(lines))
    chosen = np.random.default_rng(0).choice(len(lines), count, replace=False)
    (work / path).write_text("".join(lines[i] + "\n" for i in sorted(chosen)), encoding="utf-8")
    return work
