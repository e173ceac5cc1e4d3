"""Intervals and p values of paired differences, and the verdict that an interval allows."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from mlx_mla.errors import UserError

BETTER, NOT_WORSE, WORSE, NOT_SHOWN = "better", "not worse", "worse", "not shown"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval; the ends are infinite for a single value."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def student() -> Any:
    """scipy.stats; UserError with what to install if it is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError("a study needs scipy; install it with: pip install -e '.[dev]'") from None
    return stats


def interval(
    values: Sequence[float], confidence: float, spread: tuple[float, int] | None = None
) -> Interval:
    """Student's t-interval of the mean of independent values.

    Args:
        values: At least one.
        confidence: Such as 0.95.
        spread: Standard deviation of a value and its degrees of freedom. None: of these values.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1 and spread is None:
        return Interval(mean, -math.inf, math.inf, 1)
    sd, degrees = spread or (statistics.stdev(values), n - 1)
    half = student().t.ppf(0.5 + confidence / 2, degrees) * sd / math.sqrt(n)
    return Interval(mean, float(mean - half), float(mean + half), n)


def pooled(samples: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """The standard deviation that several samples share, and its degrees of freedom; None where no
    sample has two values."""
    degrees = sum(len(values) - 1 for values in samples)
    if degrees < 1:
        return None
    squares = sum(statistics.variance(v) * (len(v) - 1) for v in samples if len(v) > 1)
    return math.sqrt(squares / degrees), degrees


def p_value(values: Sequence[float]) -> float | None:
    """Of Student's two-sided test that the mean is zero; None for a single value."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return float(values[0] == 0)
    return float(student().ttest_1samp(values, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's method, in the same order."""
    adjusted, largest = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(difference: Interval, margin: float) -> str:
    """What a paired difference of losses (arm less rival) shows.

    Args:
        difference: With its interval.
        margin: How much more loss still counts as not worse.
    """
    if difference.high < 0:
        return BETTER
    if difference.high <= margin:
        return NOT_WORSE
    return WORSE if difference.low > 0 else NOT_SHOWN
