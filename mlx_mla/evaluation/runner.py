"""Running tasks on a model: what `python -m mlx_mla.evaluate` and training with --eval-tasks
share."""

import difflib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla import hints
from mlx_mla.backends.contract import Backend
from mlx_mla.config import InferenceDType
from mlx_mla.data.tokenizer import encode
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.errors import UserError
from mlx_mla.evaluation.item_store import ItemStore
from mlx_mla.evaluation.scoring import Block, Scorer, Scores, check_lengths, score
from mlx_mla.evaluation.tasks import TASKS, Context, Measured, Task
from mlx_mla.evaluation.tasks.base import Definition
from mlx_mla.evaluation.tasks.data import unpublished


def task_names(tasks: str, option: str = "--tasks", also: Sequence[str] = ()) -> list[str]:
    """The tasks of a comma-separated list; UserError for an unknown one names the nearest.

    Args:
        option: Where the list was given, for messages.
        also: Names to allow beside those of TASKS.
    """
    known = [*TASKS, *also]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option} names no task; known are {', '.join(known)}")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1, 0.3)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"{option}: unknown task {name!r}; {hint}")
    return list(dict.fromkeys(names))


def load(
    task: Task, protocol: Definition, data_dir: Path | None, limit: int | None, seed: int
) -> list[Any]:
    """The documents of a task, or a seeded sample of `limit` of them.

    Args:
        data_dir: Folder with the task's file; None: the Hugging Face hub.

    Raises:
        UserError: If they cannot be had, or are not what the task needs.
    """
    if data_dir is None:
        documents = task.documents_from_hub(protocol)
    else:
        path = data_dir / task.files[protocol]
        if not path.is_file():
            raise UserError(f"{path}: no such file; the folder of --data-dir must hold it")
        documents = task.documents_from_file(path, protocol)
        hints.add(unpublished(path))
    if limit is None:
        return documents
    return task.sample(documents, limit, np.random.default_rng(seed))


def check_tokenizer(scorer: Scorer, folder: Path) -> None:
    """UserError if the tokenizer has ids that the model lacks."""
    if len(scorer.tokenizer) > scorer.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {len(scorer.tokenizer)} tokens and the model "
            f"{scorer.vocab_size}; "
            "copy the tokenizer files of the model it was made from"
        )


def context_of(
    tokenizer: Any, n_positions: int, window: int, limit: int | None, seed: int
) -> Context:
    """How a model's tokenizer (transformers) turns documents into requests.

    Raises:
        UserError: If it has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the model's tokenizer has no end-of-text token, with which every task begins documents"
        )
    return Context(
        partial(encode, tokenizer), tokenizer.eos_token_id, n_positions, window, limit, seed
    )


class PreparedTask:
    """A task's documents as requests to one tokenizer and position table.

    Raises:
        UserError: If a request does not fit the model.
    """

    def __init__(
        self, task: Task, documents: Sequence[Any], protocol: Definition, context: Context
    ):
        self.task, self._documents, self._protocol, self._context = (
            task,
            documents,
            protocol,
            context,
        )
        self._requests = task.requests(documents, protocol, context)
        self._flat = [request for own in self._requests for request in own]
        check_lengths(self._flat, context.n_positions)

    def run(
        self, scorer: Scorer, batch_size: int,
        store: ItemStore | None = None, progress: Callable[[int, int], None] | None = None,
    ) -> list[Measured]:  # fmt: skip
        """Score every request and measure.

        Args:
            batch_size: Most rows of one pass.
            store: Where finished items are kept, and taken from; None: nowhere.
            progress: Called with the number of finished requests and of all.
        """
        found = {} if store is None else store.read(self._flat)
        missing = [i for i in range(len(self._flat)) if i not in found]
        finished = len(found)

        def done(index: int, scores: Scores) -> None:
            nonlocal finished
            finished += 1
            if store is not None:
                store.add(index, scores)
            if progress is not None:
                progress(finished, len(self._flat))

        found |= score(scorer, self._flat, batch_size, done, missing)
        ordered = iter(range(len(self._flat)))
        scores = [[found[next(ordered)] for _ in own] for own in self._requests]
        return self.task.measure(
            self._documents, self._protocol, self._context, self._requests, scores
        )


def metrics(measured: Sequence[Measured]) -> dict[str, Any]:
    """Values by name, each with `NAME_stderr` and `NAME_count`, proportions also with the ends of
    their 95 % interval, `NAME_low` and `NAME_high`; and the number of items as `n`."""
    row: dict[str, Any] = {}
    for quantity in measured:
        metric = quantity.metric()
        row[metric.name] = metric.value
        row[f"{metric.name}_stderr"] = metric.stderr
        if metric.interval is not None:
            row[f"{metric.name}_low"], row[f"{metric.name}_high"] = metric.interval
        row[f"{metric.name}_count"] = {metric.unit: metric.count}
        row.setdefault("n", metric.n)
    return row


def speed(
    backend: Backend, folder: Path, scorer: Scorer, dtype: InferenceDType
) -> dict[str, dict[str, float]]:
    """Tokens per second: median, smallest and largest of 5 runs after a warm-up, in this process.

    Args:
        dtype: The scorer's, and generation's.

    `forward_tps`: one row of 512 tokens (or n_positions), logits of all. `generation_tps` and
        `ttft_ms`: greedy,
    64 tokens after a prompt of 64, with the latent cache; the first token is apart from the rate.
    """
    length = min(512, scorer.n_positions)
    ids = np.random.default_rng(0).integers(0, len(scorer.tokenizer), (1, length)).astype(np.int32)
    block = Block(ids, np.zeros(1, np.int32), np.arange(length, dtype=np.int32), ids[0])
    forward = []
    for _ in range(6):
        began = time.perf_counter()
        scorer.run(None, [block])
        forward.append(length / (time.perf_counter() - began))
    half = min(64, scorer.n_positions // 2)
    decoder = backend.decoder(folder, "latent", dtype)
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
