"""The interface of a task, and the statistics that all tasks share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mlx_mla.data.tokenizer import encode
from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, Scores

Definition = Literal["standard", "original"]
Z95 = 1.959964


@dataclasses.dataclass(frozen=True)
class TaskSetup:
    """Everything besides the documents that affects the requests.

    Raises:
        UserError: If the tokenizer has no end-of-text token.
    """

    tokenizer: Any
    """The model's transformers tokenizer."""
    n_positions: int
    window: int
    """Tokens of a WikiText window."""
    limit: int | None = None
    """Number of windows to sample from a text that is a single document. None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "the model's tokenizer has no end-of-text token, which every task needs to start "
                "a document"
            )

    @property
    def start(self) -> int:
        """The token before a document, as in lm-evaluation-harness: the tokenizer's beginning of
        text, or else its end of text."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text to token ids.

        Args:
            special: Add the special tokens that the tokenizer adds by default, such as Llama's
                beginning of text.
        """
        return encode(self.tokenizer, text, special)

    def choices(self, context: str, endings: Sequence[str]) -> Request:
        """Encode a context and its endings, split as lm-evaluation-harness splits them.

        Both are encoded together, since a tokenizer may join characters across the boundary. Blanks
        at the end of the context belong to the ending. An empty context becomes `start`.

        Raises:
            UserError: If an ending has no token of its own.
        """
        stem = context.rstrip()
        blanks = context[len(stem) :]
        head = self.encode(stem, special=True)
        targets = [
            tuple(self.encode(stem + blanks + ending, special=True)[len(head) :])
            for ending in endings
        ]
        if not all(targets):
            raise UserError(
                "the model's tokenizer joins words into one token, so that an ending has no token "
                f"of its own ({endings[targets.index(())]!r}); this task cannot score it"
            )
        return Request(tuple(head) or (self.start,), tuple(targets))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One quantity of every item. The metric is the sum of the amounts divided by the sum of the
    weights."""

    name: str
    amounts: np.ndarray
    """float64 (items,)."""
    weights: np.ndarray
    """float64 (items,): 1 each for accuracies; tokens, words or bytes for perplexities."""
    perplexity: bool = False
    """True if the metric is exp of the ratio of the sums, rather than the ratio."""
    unit: str = "item"
    """The unit that the weights count, for display."""
    proportion: bool = False
    """True if the amounts are 0 or 1 and the metric is a proportion."""

    def figures(self) -> dict[str, Any]:
        """The metric NAME with its standard error, treating items as independent draws.

        The error is that of a ratio of sums; for equal weights, this is the usual sample standard
        error. For a perplexity, the delta method multiplies the error of the logarithm by the
        perplexity.

        Returns:
            NAME; `NAME_stderr`, which is NaN for a single item; `NAME_count`, what the value is
            averaged over; and for a proportion `NAME_low` and `NAME_high`, the ends of its 95 %
            interval, which is not empty even at 0 or 1.
        """
        ratio = self.amounts.sum() / self.weights.sum()
        value, error = float(ratio), _ratio_error(self.amounts - ratio * self.weights, self.weights)
        if self.perplexity:
            value = _exp(ratio)
            error = value * error
        row: dict[str, Any] = {self.name: value, f"{self.name}_stderr": error}
        if self.proportion and len(self.amounts):
            low, high = wilson(int(self.amounts.sum()), len(self.amounts))
            row |= {f"{self.name}_low": low, f"{self.name}_high": high}
        return {**row, f"{self.name}_count": {self.unit: float(self.weights.sum())}}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of two models by one metric on the same items."""

    difference: float
    """Second value minus first value; for perplexities, their ratio minus 1."""
    low: float
    high: float
    """95 % confidence interval of `difference`."""

    @property
    def shown(self) -> bool:
        """True if the interval excludes 0."""
        return not self.low <= 0 <= self.high


def compare(first: Measured, second: Measured) -> Comparison | None:
    """Compare two paired measurements; None if they differ in their items or units."""
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
    """A benchmark. It reads documents from a file or the hub, and turns each into requests."""

    name: str
    files: dict[Definition, str]
    """Path of its file under --data-dir, by protocol."""
    why_not_standard: str
    """How the original protocol differs from the standard one, in one sentence."""

    def documents_from_file(self, path: Any, protocol: Definition) -> list[Any]:
        """Read the documents from the task's file.

        Raises:
            UserError: If the file is malformed; the message names file, line and field.
        """
        raise NotImplementedError

    def documents_from_hub(self, protocol: Definition) -> list[Any]:
        """Read the same documents from the hub through `datasets`, which caches its downloads."""
        raise NotImplementedError

    def sample(
        self, documents: Sequence[Any], limit: int, random: np.random.Generator
    ) -> list[Any]:
        """Return a random sample of `limit` documents, in their original order."""
        if limit >= len(documents):
            return list(documents)
        return [documents[i] for i in sorted(random.choice(len(documents), limit, replace=False))]

    def requests(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ) -> list[list[Request]]:
        """Return one list of requests per document."""
        raise NotImplementedError

    def measure(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup,
        requests: Sequence[Sequence[Request]], scores: Sequence[Sequence[Scores]],
    ) -> list[Measured]:  # fmt: skip
        """Compute the metrics from the scores of the requests."""
        raise NotImplementedError


def accuracy(name: str, correct: Sequence[bool]) -> Measured:
    """Proportion of correct items."""
    return Measured(name, np.array(correct, np.float64), np.ones(len(correct)), proportion=True)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    share, z2 = successes / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Exact at 0 and 1, which rounding could exceed.
    return middle - reach if successes else 0.0, middle + reach if successes < n else 1.0


def _paired_proportions(delta: np.ndarray) -> Comparison:
    """Compute the 95 % interval of the difference of two proportions over the same items.

    Half an item is added to each cell of their 2 x 2 table, so the interval is not empty if all
    answers agree (Agresti and Min 2005, section 4.2).

    Args:
        delta: The differences (items,), each -1, 0 or 1.
    """
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
