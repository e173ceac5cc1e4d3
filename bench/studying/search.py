"""What is tuned for an arm: from losses over a grid of values to the value of the final runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Search:
    """What the losses so far say."""

    wanted: tuple[float, ...]
    """Values that must be tried before more can be said."""
    tried: tuple[float, ...]
    """The grid, with what its edges added."""
    losses: Mapping[float, float]
    """Of those tried, as far as they have finished."""
    best: float | None
    """The value for the final runs; None while some are wanted, or where all diverged."""
    note: str
    """How it was found."""


def search(grid: Sequence[float], losses: Mapping[float, float], extensions: int) -> Search:
    """Choose a value, such as a learning rate.

    It is the minimum of the parabola, in the value's logarithm, through the best one and its two
    neighbours, rounded to two digits: it lies within half a step of the best one. The final runs
    are then fresh for every arm, so that none is favoured by the luck of its tuning run, and no arm
    is penalised by where its optimum lies between two values of the grid.

    Args:
        grid: The values to try, all positive; a single one is taken as it is.
        losses: Losses of the values tried, infinite for a run that diverged.
        extensions: How many values may be added beyond the grid, a step each, while the best lies
            at an edge.
    """
    values = sorted(grid)

    def found(best: float | None, note: str, wanted: tuple[float, ...] = ()) -> Search:
        known = {v: losses[v] for v in values if v in losses}
        return Search(wanted, tuple(values), known, best, note)

    if len(values) == 1:
        return found(values[0], "given, not tuned")
    for added in range(extensions + 1):
        if missing := tuple(v for v in values if v not in losses):
            return found(None, "", missing)
        at = min(range(len(values)), key=lambda i: losses[values[i]])
        if 0 < at < len(values) - 1 and math.isfinite(losses[values[at]]):
            break
        if added < extensions:
            # Where all diverged, the least of equals is the lowest value.
            if at == 0:
                values.insert(0, _three_digits(values[0] ** 2 / values[1]))
            else:
                values.append(_three_digits(values[-1] ** 2 / values[-2]))
    best = values[at]
    if not math.isfinite(losses[best]):
        return found(None, "diverged at every one")
    if at in (0, len(values) - 1):
        return found(best, "at the edge of those tried")
    three = [losses[v] for v in values[at - 1 : at + 2]]
    if not all(map(math.isfinite, three)):
        return found(best, "the next one diverged")
    x = [math.log(v) for v in values[at - 1 : at + 2]]
    return found(float(f"{math.exp(_vertex(x, three)):.2g}"), "fitted")


def _vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """Where the parabola through three points is least; the middle one is not above the others."""
    left, right = x[1] - x[0], x[2] - x[1]
    down, up = (y[1] - y[0]) / left, (y[2] - y[1]) / right
    if up == down:
        return x[1]  # three equal losses
    # The slope is `down` midway between the first two, `up` midway between the last two.
    return (x[0] + x[1]) / 2 - down * (left + right) / 2 / (up - down)


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
