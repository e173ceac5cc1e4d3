"""Student's interval of a mean, and the verdict that it allows."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

BETTER, NOT_WORSE, WORSE, NOT_SHOWN = "better", "not worse", "worse", "not shown"


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval; the ends are infinite for a single value."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float], confidence: float) -> Interval:
    """Student's t-interval of the mean of independent values.

    Args:
        values: At least one.
        confidence: Such as 0.95.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(0.5 + confidence / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def verdict(difference: Interval, margin: float) -> str:
    """What a paired difference of losses (arm less baseline) shows.

    Args:
        difference: With its interval.
        margin: How much more loss still counts as not worse.
    """
    if difference.high < 0:
        return BETTER
    if difference.high <= margin:
        return NOT_WORSE
    return WORSE if difference.low > 0 else NOT_SHOWN


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, by bisection.

    Args:
        probability: Between 0.5 and 1.
        degrees: Degrees of freedom, at least 1.
    """
    assert 0.5 <= probability < 1
    low, high = 0.0, 1.0
    while _central(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _central(t: float, degrees: int) -> float:
    """P(|T| < t), the finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3
    and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
