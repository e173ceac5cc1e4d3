"""Evaluate models: `python -m mlx_mla.evaluate`."""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import numpy as np
from rich.markup import escape
from rich.progress import Progress

from mlx_mla import cli
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Backend
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.data.tokenizer import without_ends
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.display import plain_console
from mlx_mla.errors import UserError
from mlx_mla.evaluation import report
from mlx_mla.evaluation.item_store import ItemStore
from mlx_mla.evaluation.runner import (
    PreparedTask,
    check_tokenizer,
    load,
    metrics,
    task_names,
)
from mlx_mla.evaluation.scoring import RowBatch, Scorer
from mlx_mla.evaluation.tasks import TASKS, Measured, Task, TaskSetup
from mlx_mla.evaluation.tasks.wikitext2 import WINDOW
from mlx_mla.fields import Bounds, PositiveInt, check_bounds
from mlx_mla.locks import locked
from mlx_mla.model.config import BackendName, DeviceName, InferenceDType, Seed

PROG = "python -m mlx_mla.evaluate"
SPEED = "speed"


@dataclasses.dataclass(kw_only=True)
class EvaluateCommand:
    """Score models on WikiText-2, LAMBADA and HellaSwag, and compare them on the same items.

    With several models, each is compared with the first. Results go to stdout as a table, and with
    --out to a JSON file, with a report (.md) and a plot (.png) beside it.
    """

    model: tuple[str, ...]
    """Run folders, model folders, or Hugging Face hub ids."""
    tasks: str = "wikitext2,lambada,hellaswag,speed"
    """Tasks, separated by commas. speed: tokens per second of the forward pass and of
    generation."""
    protocol: Literal["standard", "original"] = "standard"
    """"standard" uses the usual definitions. "original" repeats what the original project
    measured."""
    limit: Optional[PositiveInt] = None
    """Score a random sample of this many items per task. None: all."""
    seed: Seed = 0
    """Seed of that sample."""
    data_dir: Optional[Path] = None
    """Folder with wikitext2/wiki.{test,valid}.raw, lambada/lambada_test.jsonl and
    hellaswag/hellaswag_val.jsonl.
    None: the Hugging Face hub."""
    window: Annotated[int, Bounds("be at least 2", 2)] = WINDOW
    """Tokens in a WikiText window. Only with 1024 are perplexities comparable with published
    ones."""
    batch_size: PositiveInt = 32
    """Maximum rows that are scored at once. Lower it if memory runs out."""
    dtype: InferenceDType = "float32"
    """Type of weights and computation, also for speed. Log-probabilities are float32."""
    backend: BackendName = "mlx"
    """Framework that runs the model."""
    device: DeviceName = "auto"
    """Device of the backend: cpu or gpu for mlx; cpu, mps or cuda for torch. "auto" uses a GPU if
    there is one."""
    out: Optional[Path] = None
    """File for the results, ending in .json. None: only print."""
    resume: bool = False
    """Resume an interrupted evaluation with the same --out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(EvaluateCommand, argv, PROG)
    names = task_names(command.tasks, also=[SPEED])
    _check(command)

    from mlx_mla.hub import find_model

    folders = [find_model(name) for name in command.model]
    backend = get_backend(command.backend, command.device)
    documents = {
        name: load(TASKS[name], command.protocol, command.data_dir, command.limit, command.seed)
        for name in names if name != SPEED
    }  # fmt: skip
    with contextlib.ExitStack() as lock:
        if (out := command.out) is not None:
            lock.enter_context(locked(out, out.with_suffix(".md"), out.with_suffix(".png")))
        _evaluate(command, names, folders, backend, documents)
    return 0


def _evaluate(
    command: EvaluateCommand,
    names: Sequence[str],
    folders: Sequence[ModelFolder],
    backend: Backend,
    documents: Mapping[str, Sequence[Any]],
) -> None:
    """Score every model on every task, print the results and write them."""
    evaluation = Evaluation(command)
    try:
        for name, folder in zip(command.model, folders):
            scorer = backend.scorer(folder, command.dtype)
            check_tokenizer(scorer, folder)
            evaluation.begin(name, folder)
            try:
                for task in names:
                    if task == SPEED:
                        evaluation.add_speed(speed(backend, folder, scorer, command.dtype))
                    else:
                        evaluation.add(TASKS[task], documents[task], scorer)
            finally:  # also write and show what was finished before an error
                if command.out is not None and evaluation.document["models"][-1]["tasks"]:
                    report.write(evaluation.document, command.out)
    finally:
        if any(row["tasks"] for row in evaluation.document["models"]):
            print(report.tables(evaluation.document), flush=True)


def _check(command: EvaluateCommand) -> None:
    check_bounds(command)
    if len(set(command.model)) < len(command.model):
        raise UserError("--model names a model twice")
    if command.resume and command.out is None:
        raise UserError("--resume needs --out, the file of the interrupted run")
    if command.out is not None:
        report.claim(command.out, command.resume)
    if command.data_dir is not None and not command.data_dir.is_dir():
        raise UserError(f"--data-dir {command.data_dir}: no such folder")


class Evaluation:
    """Results so far, in the shape of the results file."""

    def __init__(self, command: EvaluateCommand):
        self.command = command
        self.measured: dict[tuple[str, str], list[Measured]] = {}
        self.vocabularies: list[dict[str, int]] = []
        self.document: dict[str, Any] = {
            "protocol": command.protocol,
            "settings": json.loads(json.dumps(dataclasses.asdict(command), default=str)),
            "notes": [],
            "models": [],
            "comparisons": [],
        }

    def begin(self, model: str, folder: ModelFolder) -> None:
        """Start the results of a model."""
        self.folder = folder
        self.vocabularies.append(folder.tokenizer.get_vocab())
        row = {"model": model, "protocol": self.command.protocol, "backend": self.command.backend}
        self.document["models"].append({**row, "dtype": self.command.dtype, "tasks": {}})

    def add(self, task: Task, documents: Sequence[Any], scorer: Scorer) -> None:
        """Run a task on the current model, and compare it with the first one."""
        command, row = self.command, self.document["models"][-1]
        setup = TaskSetup(
            scorer.tokenizer, scorer.n_positions, command.window, command.limit, command.seed
        )
        prepared = PreparedTask(task, documents, command.protocol, setup)
        store = None
        if command.out is not None:
            settings = [self.folder.fingerprint, command.backend, command.dtype]
            settings += [task.name, command.protocol]
            store = ItemStore(report.items_folder(command.out), settings)
        console = plain_console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            shown = bar.add_task(escape(f"{row['model']} {task.name}"))
            measured = prepared.run(
                scorer, command.batch_size, store,
                lambda finished, total: bar.update(shown, completed=finished, total=total),
            )  # fmt: skip
        self.measured[row["model"], task.name] = measured
        row["tasks"][task.name] = metrics(measured)
        if len(scorer.tokenizer) < scorer.vocab_size:
            self._note(
                f"{row['model']}: {scorer.vocab_size - len(scorer.tokenizer)} rows that pad the "
                "vocabulary are masked"
            )
        if command.protocol == "original":
            self._note(task.why_not_standard)
        if task.name == "wikitext2" and command.protocol == "standard" and command.window != WINDOW:
            self._note(f"wikitext2: windows of {command.window} tokens, not the usual {WINDOW}")
        if command.limit is not None:
            self._note(f"a random sample of {command.limit} items a task (seed {command.seed})")
        first = self.document["models"][0]["model"]
        if first != row["model"]:
            pairs = report.compare_models(
                first, row["model"], task.name, self.measured[first, task.name], measured,
                same_tokens=self.vocabularies[0] == self.vocabularies[-1],
            )  # fmt: skip
            self.document["comparisons"] += pairs

    def add_speed(self, figures: dict[str, dict[str, float]]) -> None:
        self.document["models"][-1]["tasks"][SPEED] = figures

    def _note(self, text: str) -> None:
        if text not in self.document["notes"]:
            self.document["notes"].append(text)


def speed(
    backend: Backend, folder: ModelFolder, scorer: Scorer, dtype: InferenceDType
) -> dict[str, dict[str, float]]:
    """Tokens per second: median, minimum and maximum of 5 runs after a warm-up, in this process.

    `forward_tps` is for one row of 512 tokens (or n_positions), with the logits of all. For
    `generation_tps` and `ttft_ms`, 64 tokens are generated greedily after a prompt of 64, with the
    latent cache; the rate does not count the first token.

    Args:
        dtype: Type of the scorer's model and of generation.
    """
    length = min(512, scorer.n_positions)
    ids = np.random.default_rng(0).integers(0, len(scorer.tokenizer), (1, length)).astype(np.int32)
    block = RowBatch(ids, np.zeros(1, np.int32), np.arange(length, dtype=np.int32), ids[0])
    forward = []
    for _ in range(6):
        began = time.perf_counter()
        scorer.run(None, [block])
        forward.append(length / (time.perf_counter() - began))
    half = min(64, scorer.n_positions // 2)
    decoder = backend.decoder(folder, "latent", dtype)
    # The prompt is noise, which a model may end at once.
    decoder.tokenizer = without_ends(decoder.tokenizer)
    options = GenerationOptions(max_tokens=half, temp=0)
    figures = [list(decoder.stream(ids[0, :half].tolist(), options))[-1].figures for _ in range(6)]
    columns = {
        "forward_tps": forward[1:],
        "generation_tps": [f["generation_tps"] for f in figures[1:]],
        "ttft_ms": [f["ttft_ms"] for f in figures[1:]],
    }
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in columns.items()
    }


if __name__ == "__main__":
    sys.exit(main())
