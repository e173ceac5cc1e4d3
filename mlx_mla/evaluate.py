"""Evaluate models: `python -m mlx_mla.evaluate`."""

import dataclasses
import difflib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

from mlx_mla import blas, cli, eval_report
from mlx_mla.backend import Backend, GenerationOptions, get_backend
from mlx_mla.errors import UserError
from mlx_mla.item_store import ItemStore
from mlx_mla.scoring import Scorer, Scores, score
from mlx_mla.tasks import TASKS, Context, Measured, Task
from mlx_mla.tasks.data import unpublished

import numpy as np
from rich.console import Console
from rich.progress import Progress

PROG = "python -m mlx_mla.evaluate"
SPEED = "speed"


@dataclasses.dataclass(kw_only=True)
class EvaluateCommand:
    """Score models on WikiText-2, LAMBADA and HellaSwag, and compare them on the same items.

    With several models, each is compared with the first. Results go to stdout as a table, and with --out
    to a JSON file, with a report (.md) and a plot (.png) beside it.
    """

    model: tuple[str, ...]
    """Run folders, model folders, or Hugging Face hub ids."""
    tasks: str = "wikitext2,lambada,hellaswag,speed"
    """Tasks, separated by commas. speed: tokens per second of the forward pass and of generation."""
    protocol: Literal["standard", "original"] = "standard"
    """standard: the field's definitions. original: what the original project measured, for its table."""
    limit: Optional[int] = None
    """Score a random sample of so many items of each task. None: all."""
    seed: int = 0
    """Seed of that sample."""
    data_dir: Optional[Path] = None
    """Folder with wikitext2/wiki.{test,valid}.raw, lambada/lambada_test.jsonl and hellaswag/hellaswag_val.jsonl.
    None: the Hugging Face hub."""
    window: int = 1024
    """Tokens of a WikiText window; another than 1024 gives perplexities that others' cannot be compared with."""
    batch_size: int = 32
    """Most rows scored at once. Lower it if memory runs out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and computation; log-probabilities are float32."""
    backend: Literal["mlx", "torch"] = "mlx"
    """Framework that does the computing."""
    device: Literal["auto", "cpu", "gpu", "mps", "cuda"] = "auto"
    """Device of the backend: cpu or gpu for mlx; cpu, mps or cuda for torch. "auto" takes a GPU where there is one."""
    out: Optional[Path] = None
    """File for the results. None: only print."""
    resume: bool = False
    """Go on with an interrupted run into the same --out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(EvaluateCommand, argv, PROG)
    names = task_names(command.tasks)
    _check(command)

    from mlx_mla.hub import find_model

    folders = [find_model(name) for name in command.model]
    if command.backend == "mlx":
        blas.load_openblas()
        if (hint := blas.hint()) is not None:
            print(hint, file=sys.stderr)
    backend = get_backend(command.backend, command.device)
    documents = {name: load(TASKS[name], command) for name in names if name != SPEED}
    evaluation = Evaluation(command)
    for name, folder in zip(command.model, folders):
        scorer = backend.scorer(folder, command.dtype)
        check_tokenizer(scorer, folder)
        evaluation.begin(name)
        for task in names:
            if task == SPEED:
                evaluation.add_speed(speed(backend, folder, scorer))
            else:
                evaluation.add(TASKS[task], documents[task], scorer)
            if command.out is not None:
                eval_report.write(evaluation.document, command.out)
    print(eval_report.tables(evaluation.document))
    return 0


def task_names(tasks: str) -> list[str]:
    """The tasks of a comma-separated list; UserError for an unknown one names the nearest."""
    known = [*TASKS, SPEED]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks names no task; known are {', '.join(known)}")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1, 0.3)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"unknown task {name!r}; {hint}")
    return list(dict.fromkeys(names))


def _check(command: EvaluateCommand) -> None:
    for name in ("limit", "batch_size"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if command.window < 2:
        raise UserError(f"--window must be at least 2, not {command.window}")
    if len(set(command.model)) < len(command.model):
        raise UserError("--model names a model twice")
    if command.resume and command.out is None:
        raise UserError("--resume needs --out, the file of the interrupted run")
    if command.out is not None and command.out.exists() and not command.resume:
        raise UserError(f"{command.out}: exists; add --resume to go on with it, or give --out a new name")
    if command.data_dir is not None and not command.data_dir.is_dir():
        raise UserError(f"--data-dir {command.data_dir}: no such folder")


def load(task: Task, command: EvaluateCommand) -> list[Any]:
    """The documents of a task, or the sample of them that --limit asks for."""
    if command.data_dir is None:
        documents = task.documents_from_hub(command.protocol)
    else:
        path = command.data_dir / task.files[command.protocol]
        documents = task.documents_from_file(path, command.protocol)
        if (warning := unpublished(path)) is not None:
            print(f"warning: {warning}", file=sys.stderr)
    if command.limit is None:
        return documents
    return task.sample(documents, command.limit, np.random.default_rng(command.seed))


def check_tokenizer(scorer: Scorer, folder: Path) -> None:
    """UserError if the tokenizer has ids that the model lacks."""
    if len(scorer.tokenizer) > scorer.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(scorer.tokenizer)} tokens and the model {scorer.vocab_size}; "
            "copy the tokenizer files of the model it was made from"
        )


def run_task(
    task: Task, documents: Sequence[Any], protocol: Any, context: Context, scorer: Scorer, batch_size: int,
    store: ItemStore | None = None, progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:  # fmt: skip
    """Score the documents of a task and measure.

    Args:
        store: Where finished items are kept, and taken from; None: nowhere.
        progress: Called with the number of finished requests and of all.
    """
    requests = task.requests(documents, protocol, context)
    flat = [request for own in requests for request in own]
    found = {} if store is None else store.read(flat)
    missing = [i for i in range(len(flat)) if i not in found]
    finished = len(found)

    def done(index: int, scores: Scores) -> None:
        nonlocal finished
        finished += 1
        if store is not None:
            store.add(index, scores)
        if progress is not None:
            progress(finished, len(flat))

    found |= score(scorer, flat, batch_size, done, missing)
    ordered = iter(range(len(flat)))
    return task.measure(
        documents, protocol, context, requests, [[found[next(ordered)] for _ in own] for own in requests]
    )


def context_of(scorer: Scorer, window: int, limit: int | None, seed: int) -> Context:
    """How a model's tokenizer turns documents into requests."""
    tokenizer = scorer.tokenizer

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return Context(encode, tokenizer.eos_token_id, scorer.n_positions, window, limit, seed)


def speed(backend: Backend, folder: Path, scorer: Scorer) -> dict[str, dict[str, float]]:
    """Tokens per second: median, smallest and largest of 5 runs after a warm-up, in this process.

    `forward_tps`: one row of 512 tokens (or n_positions), logits of all. `generation_tps` and `ttft_ms`: greedy,
    64 tokens after a prompt of 64, with the latent cache; the first token is apart from the rate.
    """
    length = min(512, scorer.n_positions)
    ids = np.random.default_rng(0).integers(0, len(scorer.tokenizer), (1, length)).astype(np.int32)
    where = np.arange(length, dtype=np.int32)
    forward = []
    for _ in range(6):
        began = time.perf_counter()
        scorer.run(None, ids, where, ids[0])
        forward.append(length / (time.perf_counter() - began))
    half = min(64, scorer.n_positions // 2)
    decoder = backend.decoder(folder, "latent")
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


class Evaluation:
    """Results so far, in the shape of the results file."""

    def __init__(self, command: EvaluateCommand):
        self.command = command
        self.measured: dict[tuple[str, str], list[Measured]] = {}
        self.document: dict[str, Any] = {
            "protocol": command.protocol,
            "settings": json.loads(json.dumps(dataclasses.asdict(command), default=str)),
            "notes": [],
            "models": [],
            "comparisons": [],
        }

    def begin(self, model: str) -> None:
        """Results that follow are this model's."""
        row = {"model": model, "protocol": self.command.protocol, "backend": self.command.backend}
        self.document["models"].append({**row, "dtype": self.command.dtype, "tasks": {}})

    def add(self, task: Task, documents: Sequence[Any], scorer: Scorer) -> None:
        """Run a task on the current model, and compare it with the first one."""
        command, row = self.command, self.document["models"][-1]
        context = context_of(scorer, command.window, command.limit, command.seed)
        store = None
        if command.out is not None:
            settings = [row["model"], command.backend, command.dtype, task.name, command.protocol]
            store = ItemStore(Path(f"{command.out}.items"), settings)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            shown = bar.add_task(f"{row['model']} {task.name}")
            measured = run_task(
                task, documents, command.protocol, context, scorer, command.batch_size, store,
                lambda finished, total: bar.update(shown, completed=finished, total=total),
            )  # fmt: skip
        self.measured[row["model"], task.name] = measured
        row["tasks"][task.name] = _metrics(measured)
        if len(scorer.tokenizer) < scorer.vocab_size:
            self._note(
                f"{row['model']}: {scorer.vocab_size - len(scorer.tokenizer)} rows that pad the vocabulary are masked"
            )
        if command.protocol == "original":
            self._note(task.why_not_standard)
        if task.name == "wikitext2" and command.protocol == "standard" and command.window != 1024:
            self._note(f"wikitext2: windows of {command.window} tokens, not the usual 1024")
        if command.limit is not None:
            self._note(f"a random sample of {command.limit} items a task (seed {command.seed})")
        first = self.document["models"][0]["model"]
        if first != row["model"]:
            pairs = eval_report.compare_models(
                first, row["model"], task.name, self.measured[first, task.name], measured
            )
            self.document["comparisons"] += pairs

    def add_speed(self, figures: dict[str, dict[str, float]]) -> None:
        self.document["models"][-1]["tasks"][SPEED] = figures

    def _note(self, text: str) -> None:
        if text not in self.document["notes"]:
            self.document["notes"].append(text)


def _metrics(measured: Sequence[Measured]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for quantity in measured:
        metric = quantity.metric()
        row[metric.name] = metric.value
        row[f"{metric.name}_stderr"] = metric.stderr
        row[f"{metric.name}_count"] = {metric.unit: metric.count}
        row.setdefault("n", metric.n)
    return row


if __name__ == "__main__":
    sys.exit(main())
