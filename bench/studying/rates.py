"""The learning rate of an arm: from losses over a grid of rates to the rate of the final runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Search:
    """What the losses so far say."""

    wanted: tuple[float, ...]
    """Rates that must be tried before more can be said."""
    tried: tuple[float, ...]
    """The grid, with what its edges added."""
    best: float | None
    """The rate for the final runs; None while some are wanted, or where all diverged."""
    note: str
    """How it was found."""


def search(grid: Sequence[float], losses: Mapping[float, float], extensions: int) -> Search:
    """Choose a rate.

    The rate is the minimum of the parabola, in the rate's logarithm, through the best rate and its
    two neighbours, rounded to two digits: it lies within half a step of the best rate. The final
    runs are then fresh for every arm, so that none is favoured by the luck of its tuning run, and
    no arm is penalised by where its optimum lies between two rates of the grid.

    Args:
        grid: The rates to try; a single one is taken as it is.
        losses: Losses of the rates tried, infinite for a run that diverged.
        extensions: How many rates may be added beyond the grid, a step each, while the best lies
            at an edge.
    """
    rates = sorted(grid)
    if len(rates) == 1:
        return Search((), tuple(rates), rates[0], "given, not tuned")
    for added in range(extensions + 1):
        if missing := tuple(r for r in rates if r not in losses):
            return Search(missing, tuple(rates), None, "")
        at = min(range(len(rates)), key=lambda i: losses[rates[i]])
        if 0 < at < len(rates) - 1 and math.isfinite(losses[rates[at]]):
            break
        if added < extensions:
            # Where all diverged, the least of equals is the lowest rate.
            if at == 0:
                rates.insert(0, _three_digits(rates[0] ** 2 / rates[1]))
            else:
                rates.append(_three_digits(rates[-1] ** 2 / rates[-2]))
    best = rates[at]
    if not math.isfinite(losses[best]):
        return Search((), tuple(rates), None, "diverged at every rate")
    if at in (0, len(rates) - 1):
        return Search((), tuple(rates), best, "at the edge of the rates tried")
    three = [losses[r] for r in rates[at - 1 : at + 2]]
    if not all(map(math.isfinite, three)):
        return Search((), tuple(rates), best, "the next rate diverged")
    x = [math.log(r) for r in rates[at - 1 : at + 2]]
    return Search((), tuple(rates), float(f"{math.exp(_vertex(x, three)):.2g}"), "fitted")


def _vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """Where the parabola through three points is least; the middle one is not above the others."""
    left, right = x[1] - x[0], x[2] - x[1]
    down, up = (y[1] - y[0]) / left, (y[2] - y[1]) / right
    if up == down:
        return x[1]  # three equal losses
    # The slope is `down` midway between the first two, `up` midway between the last two.
    return (x[0] + x[1]) / 2 - down * (left + right) / 2 / (up - down)


def _three_digits(rate: float) -> float:
    return float(f"{rate:.3g}")
