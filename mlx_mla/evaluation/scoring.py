"""Log-probabilities of given continuations, batched: what every evaluation task comes down to.

The plan that keeps it fast: items are sorted by length; continuations of one context share its
first tokens, which are computed once and repeated in the cache; lengths are padded on the right,
where causal attention does not look, to multiples of `BUCKET`, so that few shapes occur; and the
vocabulary's logits are computed only where a token is scored.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from mlx_mla.decoding.request import OVERFLOWS
from mlx_mla.errors import UserError

BUCKET = 8
# Most tokens of one pass, over all rows, and most positions whose logits are held at once.
PASS_TOKENS = 16384
HEAD_POSITIONS = 1024


class Scorer(Protocol):
    """A loaded model that scores tokens."""

    tokenizer: Any
    """A transformers tokenizer; ids it does not have (a padded vocabulary) get no probability."""
    n_positions: int
    vocab_size: int

    def run(
        self, prefix: np.ndarray | None, ids: np.ndarray, where: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score tokens in one pass.

        Args:
            prefix: Token ids (B, P) that stand before the rows of `ids`; None for none.
            ids: Token ids (B * n, L); rows i * n ... i * n + n - 1 follow row i of `prefix`.
            where: Positions (K,) in the flattened `ids` after which a token is scored.
            targets: Those tokens (K,).

        Returns:
            Their log-probabilities in nats, float32 (K,), and whether each was the likeliest, bool
            (K,).
        """
        ...


@contextlib.contextmanager
def expanded_cache(model: Any) -> Iterator[None]:
    """Lets a model of either framework cache expanded keys and values for the time: the rows of a
    prefix would each expand its latents anew."""
    model.materialize_cache(True)
    try:
        yield
    finally:
        model.materialize_cache(False)


@dataclasses.dataclass(frozen=True)
class Request:
    """A context and the continuations of it to score, all as token ids; none is empty."""

    context: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Scores:
    """For each continuation of a request:"""

    logprob: tuple[float, ...]
    """The summed log-probability of its tokens, in nats."""
    greedy: tuple[bool, ...]
    """Whether every token was the likeliest one."""


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Rows that share a prefix: the part of a request that one pass computes."""

    request: int
    first: int
    prefix: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.prefix), len(self.rows), _padded(max(map(len, self.rows)))


def score(
    scorer: Scorer,
    requests: Sequence[Request],
    batch_size: int = 32,
    done: Callable[[int, Scores], None] | None = None,
    only: Sequence[int] | None = None,
) -> dict[int, Scores]:
    """Score requests, longest first, so that a batch that does not fit in memory shows at once.

    A context too long for the position table loses its oldest tokens (as in lm-evaluation-harness).

    Args:
        scorer: The model.
        requests: What to score.
        batch_size: Most rows of one pass.
        done: Called with the index and the scores of each request when it is finished.
        only: Indices of the requests to score; None: all.

    Returns:
        The scores by index.

    Raises:
        UserError: If a continuation alone does not fit in n_positions, or the model gives no finite
            probabilities.
    """
    check_lengths(requests, scorer.n_positions)
    chosen = range(len(requests)) if only is None else only
    units = [u for i in chosen for u in _units(i, requests[i], scorer.n_positions)]
    units.sort(key=lambda u: (len(u.prefix) + u.shape[2], u.shape), reverse=True)
    parts: dict[int, dict[int, tuple[float, bool]]] = {i: {} for i in chosen}
    finished: dict[int, Scores] = {}
    for batch in _batches(units, batch_size):
        for unit, values in zip(batch, _run(scorer, batch)):
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
    """UserError if a continuation alone does not fit in the position table."""
    longest = max((len(target) for request in requests for target in request.targets), default=0)
    if longest > n_positions:
        raise UserError(
            f"a continuation of {longest} tokens does not fit this model's "
            f"n_positions={n_positions}"
        )


def encode_pair(
    encode: Callable[[str], Sequence[int]], end_of_text: int, context: str, ending: str
) -> Request:
    """Tokens of a context and one ending, split as lm-evaluation-harness does.

    Both are encoded together, since a tokenizer may join characters across the seam; blanks at the
    end of the context belong to the ending. An empty context becomes the end-of-text token.
    """
    return encode_choices(encode, end_of_text, context, [ending])


def encode_choices(
    encode: Callable[[str], Sequence[int]], end_of_text: int, context: str, endings: Sequence[str]
) -> Request:
    """As `encode_pair`, for several endings of one context."""
    stem = context.rstrip()
    blanks = context[len(stem) :]
    head = encode(stem)
    targets = [tuple(encode(stem + blanks + ending)[len(head) :]) for ending in endings]
    return Request(tuple(head) or (end_of_text,), tuple(targets))


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
    """Neighbours of one shape together, as many as --batch-size and the size of a pass allow."""
    batch: list[_Unit] = []
    for unit in units:
        prefix, rows, length = unit.shape
        full = (len(batch) + 1) * rows > batch_size or (len(batch) + 1) * rows * (
            prefix + length
        ) > PASS_TOKENS
        if batch and (full or unit.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _run(scorer: Scorer, batch: Sequence[_Unit]) -> Iterator[list[tuple[float, bool]]]:
    prefix_length, n, length = batch[0].shape
    length = min(length, scorer.n_positions - prefix_length)
    ids = np.zeros((len(batch) * n, length), np.int32)
    where: list[int] = []
    targets: list[int] = []
    counts = []
    for i, unit in enumerate(batch):
        for k, (row, target) in enumerate(zip(unit.rows, unit.targets)):
            r = i * n + k
            ids[r, : len(row)] = row
            first = r * length + len(row) - len(target)
            where += range(first, first + len(target))
            targets += target
            counts.append(len(target))
    prefix = np.array([u.prefix for u in batch], np.int32) if prefix_length else None
    logprobs, greedy = scorer.run(
        prefix, ids, np.array(where, np.int32), np.array(targets, np.int32)
    )
    ends = np.cumsum([0, *counts])
    values = [
        (float(logprobs[a:b].sum(dtype=np.float64)), bool(greedy[a:b].all()))
        for a, b in pairwise(ends)
    ]
    for i in range(len(batch)):
        yield values[i * n : (i + 1) * n]


def _padded(length: int) -> int:
    return -(-length // BUCKET) * BUCKET
