"""Batched log-probabilities of given continuations, to which every evaluation task reduces.

Five measures keep it fast. Items are sorted by length. The continuations of a context share its
prefix, which is computed once, in a batch with the prefixes of other contexts. The rows after the
prefixes are sorted by length, so there is little padding. Rows are padded on the right, which
causal attention ignores, to multiples of `BUCKET`, so few shapes occur. Logits are computed only at
positions after which a token is scored.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from mlx_mla.decoding.request import OVERFLOWS
from mlx_mla.errors import UserError

BUCKET = 8
# Maximum tokens of one pass, over all rows, and maximum positions whose logits are held at once.
PASS_TOKENS = 16384
HEAD_POSITIONS = 1024

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RowBatch:
    """Rows that are computed together.

    Attributes:
        ids: Token ids (R, L).
        parents: For each row, the row of its prefix (R,).
        where: Positions (K,) in the flattened `ids` after which a token is scored.
        targets: The scored tokens (K,).
    """

    ids: np.ndarray
    parents: np.ndarray
    where: np.ndarray
    targets: np.ndarray


class Scorer(Protocol):
    """A loaded model that scores tokens."""

    tokenizer: Any
    """A transformers tokenizer. Ids beyond its size (a padded vocabulary) get no probability."""
    n_positions: int
    vocab_size: int

    def run(
        self, prefix: np.ndarray | None, blocks: Sequence[RowBatch]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score the tokens of several blocks, one block after another.

        Args:
            prefix: Token ids (B, P) that precede the rows of the blocks; None: no prefix.

        Returns:
            The log-probabilities of the tokens of all blocks, in order, in nats, float32; and a
            bool for each, True if it was the most likely token.
        """
        ...


@contextlib.contextmanager
def expanded_cache(model: Any) -> Iterator[None]:
    """Context in which a model of either framework caches expanded keys and values.

    Otherwise, every row would expand the latents of its prefix again.
    """
    model.materialize_cache(True)
    try:
        yield
    finally:
        model.materialize_cache(False)


@dataclasses.dataclass(frozen=True)
class Request:
    """A context and the continuations of it to score, as token ids. None of them is empty."""

    context: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a request, with one entry per continuation."""

    logprob: tuple[float, ...]
    """Summed log-probability of the continuation's tokens, in nats."""
    greedy: tuple[bool, ...]
    """True if every token of the continuation was the most likely one."""


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Rows of a request that share a prefix and are computed together."""

    request: int
    first: int
    prefix: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


def score(
    scorer: Scorer,
    requests: Sequence[Request],
    batch_size: int = 32,
    done: Callable[[int, Scores], None] | None = None,
    only: Sequence[int] | None = None,
) -> dict[int, Scores]:
    """Score requests: first those without a shared prefix, then the others, longest first.

    With this order, a batch that does not fit in memory fails early. A context that is too long for
    the model loses its oldest tokens, as in lm-evaluation-harness.

    Args:
        batch_size: Maximum rows of one pass.
        done: Called with the index and the scores of each request when it is finished.
        only: Indices of the requests to score. None: all.

    Returns:
        The scores by index.

    Raises:
        UserError: If a continuation alone does not fit in n_positions, or the model returns
            probabilities that are not finite.
    """
    check_lengths(requests, scorer.n_positions)
    chosen = range(len(requests)) if only is None else only
    units = [u for i in chosen for u in _units(i, requests[i], scorer.n_positions)]
    units.sort(key=lambda u: (not u.prefix, len(u.prefix), u.longest), reverse=True)
    parts: dict[int, dict[int, tuple[float, bool]]] = {i: {} for i in chosen}
    finished: dict[int, Scores] = {}
    for batch in _batches(units, batch_size):
        for unit, values in zip(batch, _run(scorer, batch, batch_size)):
            if not all(math.isfinite(logprob) for logprob, _ in values):
                raise UserError(OVERFLOWS)
            own = parts[unit.request]
            own.update({unit.first + k: value for k, value in enumerate(values)})
            if len(own) == len(requests[unit.request].targets):
                ordered = [own[k] for k in range(len(own))]
                result = Scores(tuple(s for s, _ in ordered), tuple(g for _, g in ordered))
                finished[unit.request] = result
                if done is not None:
                    done(unit.request, result)
    return finished


def check_lengths(requests: Sequence[Request], n_positions: int) -> None:
    """Raise a UserError if a continuation alone does not fit in n_positions."""
    longest = max((len(target) for request in requests for target in request.targets), default=0)
    if longest > n_positions:
        raise UserError(
            f"a continuation of {longest} tokens does not fit this model's "
            f"n_positions={n_positions}"
        )


def _units(index: int, request: Request, n_positions: int) -> Iterator[_Unit]:
    longest = max(map(len, request.targets))
    context = request.context
    several = len(request.targets) > 1 and len(context) + longest - 1 <= n_positions
    shared = (len(context) - 1) // BUCKET * BUCKET if several else 0
    if shared:
        rows = tuple(context[shared:] + t[:-1] for t in request.targets)
        yield _Unit(index, 0, context[:shared], rows, request.targets)
        return
    for k, target in enumerate(request.targets):
        yield _Unit(index, k, (), ((context + target[:-1])[-n_positions:],), (target,))


def _batches(units: Sequence[_Unit], batch_size: int) -> Iterator[list[_Unit]]:
    """Group neighbors with prefixes of equal length, as many as --batch-size and a pass allow."""

    def fits(batch: list[_Unit], unit: _Unit) -> bool:
        n, length = len(batch) + 1, len(unit.prefix)
        small = n <= batch_size and n * max(1, length) <= PASS_TOKENS
        return small and length == len(batch[0].prefix)

    return _grouped(units, fits)


def _grouped(items: Iterable[T], fits: Callable[[list[T], T], bool]) -> Iterator[list[T]]:
    """Group consecutive items for as long as the next one fits into the group."""
    group: list[T] = []
    for item in items:
        if group and not fits(group, item):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


@dataclasses.dataclass(frozen=True)
class _ScoredRow:
    unit: int
    """Index of its unit in the batch, whose prefix the row follows."""
    k: int
    """Index of the row in its unit."""
    ids: tuple[int, ...]
    target: tuple[int, ...]


def _blocks(batch: Sequence[_Unit], batch_size: int) -> Iterator[list[_ScoredRow]]:
    """Group the rows of a batch by padded length."""
    rows = [
        _ScoredRow(i, k, ids, target)
        for i, unit in enumerate(batch)
        for k, (ids, target) in enumerate(zip(unit.rows, unit.targets))
    ]
    rows.sort(key=lambda row: len(row.ids), reverse=True)

    def fits(block: list[_ScoredRow], row: _ScoredRow) -> bool:
        n, longest = len(block) + 1, _padded(len(block[0].ids))
        small = n <= batch_size and n * (len(batch[0].prefix) + longest) <= PASS_TOKENS
        return small and _padded(len(row.ids)) == longest

    return _grouped(rows, fits)


def _row_batch(rows: Sequence[_ScoredRow], room: int) -> RowBatch:
    length = min(_padded(len(rows[0].ids)), room)
    ids = np.zeros((len(rows), length), np.int32)
    where: list[int] = []
    targets: list[int] = []
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = row.ids
        first = r * length + len(row.ids) - len(row.target)
        where += range(first, first + len(row.target))
        targets += row.target
    parents = np.array([row.unit for row in rows], np.int32)
    return RowBatch(ids, parents, np.array(where, np.int32), np.array(targets, np.int32))


def _run(
    scorer: Scorer, batch: Sequence[_Unit], batch_size: int
) -> Iterator[list[tuple[float, bool]]]:
    length = len(batch[0].prefix)
    blocks = list(_blocks(batch, batch_size))
    prefix = np.array([u.prefix for u in batch], np.int32) if length else None
    logprobs, greedy = scorer.run(
        prefix, [_row_batch(rows, scorer.n_positions - length) for rows in blocks]
    )
    rows = [row for block in blocks for row in block]
    ends = np.cumsum([0, *(len(row.target) for row in rows)])
    values = {
        (row.unit, row.k): (float(logprobs[a:b].sum(dtype=np.float64)), bool(greedy[a:b].all()))
        for row, (a, b) in zip(rows, pairwise(ends))
    }
    for i, unit in enumerate(batch):
        yield [values[i, k] for k in range(len(unit.rows))]


def _padded(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
