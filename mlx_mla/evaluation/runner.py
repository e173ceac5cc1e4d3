"""Run tasks on a model, for `python -m mlx_mla.evaluate` and for training with --eval-tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla.errors import UserError, add_hint, names_in
from mlx_mla.evaluation.item_store import ItemStore
from mlx_mla.evaluation.scoring import Scorer, Scores, check_lengths, score
from mlx_mla.evaluation.tasks import TASKS, Measured, Task, TaskSetup
from mlx_mla.evaluation.tasks.base import Definition
from mlx_mla.evaluation.tasks.data import unpublished


def task_names(tasks: str, option: str = "--tasks", also: Sequence[str] = ()) -> list[str]:
    """Parse a comma-separated list of tasks.

    Args:
        option: The option that holds the list, for messages.
        also: Names to allow besides those of TASKS.

    Raises:
        UserError: If a task is unknown; the message names the closest match.
    """
    known = [*TASKS, *also]
    names = names_in(tasks, known, option)
    if not names:
        raise UserError(f"{option} names no task; known: {', '.join(known)}")
    return names


def load(
    task: Task, protocol: Definition, data_dir: Path | None, limit: int | None, seed: int
) -> list[Any]:
    """Load the documents of a task.

    Args:
        protocol: The protocol, which selects the documents.
        data_dir: Folder with the task's file. None: the Hugging Face hub.
        limit: Number of documents to sample. None: all.
        seed: Seed of the sample.

    Raises:
        UserError: If the documents cannot be loaded, or do not have the form that the task needs.
    """
    if data_dir is None:
        documents = task.documents_from_hub(protocol)
    else:
        path = data_dir / task.files[protocol]
        if not path.is_file():
            raise UserError(f"{path}: no such file; the folder of --data-dir must hold it")
        documents = task.documents_from_file(path, protocol)
        add_hint(unpublished(path))
    if limit is None:
        return documents
    return task.sample(documents, limit, np.random.default_rng(seed))


def check_tokenizer(scorer: Scorer, folder: object) -> None:
    """Raise a UserError if the tokenizer has more ids than the model."""
    if len(scorer.tokenizer) > scorer.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(scorer.tokenizer)} tokens, but the model has "
            f"{scorer.vocab_size}; copy the tokenizer files of the model that it comes from"
        )


class PreparedTask:
    """A task's documents as requests for one tokenizer and one number of positions.

    Raises:
        UserError: If a request does not fit the model.
    """

    def __init__(
        self, task: Task, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ):
        self.task, self._setup = task, setup
        self._documents, self._protocol = documents, protocol
        self._requests = task.requests(documents, protocol, setup)
        self._flat = [request for own in self._requests for request in own]
        check_lengths(self._flat, setup.n_positions)

    def run(
        self, scorer: Scorer, batch_size: int,
        store: ItemStore | None = None, progress: Callable[[int, int], None] | None = None,
    ) -> list[Measured]:  # fmt: skip
        """Score every request and compute the metrics.

        Args:
            batch_size: Maximum rows of one pass.
            store: Store from which finished items are read and to which new ones are added. None:
                no store.
            progress: Called with the numbers of finished requests and of all requests.
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
            self._documents, self._protocol, self._setup, self._requests, scores
        )


def metrics(measured: Sequence[Measured]) -> dict[str, Any]:
    """The figures of every metric (`Measured.figures`), and `n`, the number of items."""
    row: dict[str, Any] = {}
    for quantity in measured:
        row |= quantity.figures()
        row.setdefault("n", len(quantity.amounts))
    return row
