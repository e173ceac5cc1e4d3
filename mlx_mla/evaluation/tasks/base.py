"""What a task is, and the statistics that all of them share."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from mlx_mla.evaluation.scoring import Request, Scores

Definition = Literal["standard", "original"]
PROTOCOLS: tuple[Definition, ...] = ("standard", "original")
Z95 = 1.959964


@dataclasses.dataclass(frozen=True)
class TaskSetup:
    """What requests depend on beside the documents."""

    encode: Callable[[str], list[int]]
    """Text to token ids, without special tokens."""
    end_of_text: int
    n_positions: int
    window: int
    """Tokens of a WikiText window."""
    limit: int | None = None
    """Windows to take at random from a text that is one document; None: all."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Measured:
    """One quantity of every item: its share of a sum, and of the count that the sum is divided
    by."""

    name: str
    amounts: np.ndarray
    """float64 (items,)."""
    weights: np.ndarray
    """float64 (items,): 1 each for accuracies; tokens, words or bytes for perplexities."""
    perplexity: bool = False
    """Whether the metric is exp of the ratio of the sums, rather than the ratio."""
    unit: str = "item"
    """What the weights count, for readers."""
    proportion: bool = False
    """Whether the amounts are 0 or 1, and the metric their share."""

    def metric(self) -> "Metric":
        """The value with its standard error, items being the independent draws.

        The error is that of a ratio of sums (for equal weights the usual sample standard error),
        and for a perplexity the delta method's: perplexity times the error of its logarithm.
        """
        ratio = self.amounts.sum() / self.weights.sum()
        error = _ratio_error(self.amounts - ratio * self.weights, self.weights)
        if self.perplexity:
            value = _exp(ratio)
            return Metric(
                self.name,
                value,
                value * error,
                len(self.amounts),
                float(self.weights.sum()),
                self.unit,
            )
        n = len(self.amounts)
        interval = wilson(int(self.amounts.sum()), n) if self.proportion and n else None
        return Metric(
            self.name, float(ratio), error, n, float(self.weights.sum()), self.unit, interval
        )


@dataclasses.dataclass(frozen=True)
class Metric:
    """A value with its uncertainty."""

    name: str
    value: float
    stderr: float
    """One standard error; NaN for a single item."""
    n: int
    """Items."""
    count: float
    """Tokens, words, bytes or items that it is averaged over."""
    unit: str
    interval: tuple[float, float] | None = None
    """95 % confidence interval of a proportion, which none right or all right do not make empty."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A metric of one model against another's on the same items."""

    difference: float
    """Value of the second minus that of the first; for perplexities their ratio minus 1."""
    low: float
    high: float
    """95 % confidence interval of `difference`."""

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return not self.low <= 0 <= self.high


def compare(first: Measured, second: Measured) -> Comparison | None:
    """Paired comparison; None where the two were not measured on the same items in the same
    units."""
    if len(first.amounts) != len(second.amounts) or len(first.amounts) < 2:
        return None
    if not np.array_equal(first.weights, second.weights):
        return None
    delta = second.amounts - first.amounts
    if first.proportion and second.proportion:
        return _paired_proportions(delta)
    mean = delta.sum() / first.weights.sum()
    reach = Z95 * _ratio_error(delta - mean * first.weights, first.weights)
    if first.perplexity:
        return Comparison(_exp(mean) - 1, _exp(mean - reach) - 1, _exp(mean + reach) - 1)
    return Comparison(float(mean), float(mean - reach), float(mean + reach))


class Task:
    """A benchmark. Documents are what a file's lines become; every document gives some requests."""

    name: str
    hub: str
    """Where `datasets` finds it, for messages."""
    files: dict[Definition, str]
    """Path of its file under --data-dir, by protocol."""
    why_not_standard: str
    """Why the original protocol's values are not the standard ones, in one sentence."""

    def documents_from_file(self, path: Any, protocol: Definition) -> list[Any]:
        """Read the file of --data-dir; UserError names file, line and field of what is wrong."""
        raise NotImplementedError

    def documents_from_hub(self, protocol: Definition) -> list[Any]:
        """Read the same from the hub through `datasets`, which keeps what it has downloaded."""
        raise NotImplementedError

    def sample(
        self, documents: Sequence[Any], limit: int, random: np.random.Generator
    ) -> list[Any]:
        """`limit` documents at random, in their order."""
        if limit >= len(documents):
            return list(documents)
        return [documents[i] for i in sorted(random.choice(len(documents), limit, replace=False))]

    def requests(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ) -> list[list[Request]]:
        """The requests of every document, in one list a document."""
        raise NotImplementedError

    def measure(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup,
        requests: Sequence[Sequence[Request]], scores: Sequence[Sequence[Scores]],
    ) -> list[Measured]:  # fmt: skip
        """The metrics from the scores of the requests."""
        raise NotImplementedError


def accuracy(name: str, correct: Sequence[bool]) -> Measured:
    """Share of correct items."""
    return Measured(name, np.array(correct, np.float64), np.ones(len(correct)), proportion=True)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    share, z2 = successes / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Exact at the ends, where rounding would pass 0 or 1.
    return middle - reach if successes else 0.0, middle + reach if successes < n else 1.0


def _paired_proportions(delta: np.ndarray) -> Comparison:
    """95 % interval of the difference of two proportions of the same items, from the differences
    (items,), each -1, 0 or 1; half an item is added to each cell of their 2 x 2 table, so that
    equal answers do not make it empty (Agresti and Min 2005, section 4.2)."""
    n = len(delta) + 2
    up, down = (delta > 0).sum() + 0.5, (delta < 0).sum() + 0.5
    middle = (up - down) / n
    reach = Z95 * math.sqrt(up + down - (up - down) ** 2 / n) / n
    return Comparison(float(delta.mean()), float(middle - reach), float(middle + reach))


def _ratio_error(residuals: np.ndarray, weights: np.ndarray) -> float:
    n = len(residuals)
    if n < 2:
        return math.nan
    return float(np.sqrt((residuals**2).sum() * n / (n - 1)) / weights.sum())


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
