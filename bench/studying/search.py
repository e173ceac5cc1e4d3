"""From the losses over a grid of values to the value that the final runs use."""

import dataclasses
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Search:
    """What the losses so far show."""

    wanted: tuple[float, ...]
    """Values that must be tried before a value can be chosen."""
    tried: tuple[float, ...]
    """The grid, with the values added beyond its edges; empty for a value that is given."""
    losses: Mapping[float, float]
    """Losses of the values that have finished."""
    best: float | None
    """The value for the final runs; None while some are wanted, or if all diverged."""
    loss: float
    """Expected at the best value: the parabola's minimum, or the loss of that value; infinite
    without one."""
    note: str
    """How the value was found."""


def search(grid: Sequence[float], losses: Mapping[float, float], extensions: int) -> Search:
    """Choose a value, such as a learning rate.

    The choice is the minimum of the parabola, in the value's logarithm, through the best value and
    its two neighbors, rounded to two digits. So no arm is penalized because its optimum lies
    between two values of the grid.

    Args:
        grid: The values to try, all positive; a single one is used as it is.
        losses: Losses of the values tried, infinite for a run that diverged.
        extensions: How many values may be added beyond the grid, one at a time, while the best
            value lies at an edge.
    """
    values = sorted(grid)

    def found(best: float | None, note: str, loss: float = math.inf) -> Search:
        tried = tuple(values) if len(grid) > 1 else ()
        wanted = tuple(v for v in tried if v not in losses)
        return Search(
            wanted, tried, {v: losses[v] for v in values if v in losses}, best, loss, note
        )

    if len(values) == 1:
        return found(values[0], "given, not tuned", losses.get(values[0], math.inf))
    for added in range(extensions + 1):
        if any(v not in losses for v in values):
            return found(None, "")
        at = min(range(len(values)), key=lambda i: losses[values[i]])
        if 0 < at < len(values) - 1 and math.isfinite(losses[values[at]]):
            break
        if added < extensions:
            # Where all diverged, min() returns the lowest value, and lower ones follow.
            if at == 0:
                values.insert(0, float(f"{values[0] ** 2 / values[1]:.3g}"))
            else:
                values.append(float(f"{values[-1] ** 2 / values[-2]:.3g}"))
    best = values[at]
    if not math.isfinite(losses[best]):
        return found(None, "diverged at every one")
    if at in (0, len(values) - 1):
        return found(best, "at the edge of those tried", losses[best])
    three = values[at - 1 : at + 2]
    if not all(math.isfinite(losses[v]) for v in three):
        return found(best, "the next one diverged", losses[best])
    x, least = _vertex([math.log(v) for v in three], [losses[v] for v in three])
    return found(float(f"{math.exp(x):.2g}"), "fitted", least)


def around(values: Sequence[float], center: float) -> tuple[float, ...]:
    """The three neighboring values of a grid whose middle one is nearest to `center`."""
    inner = range(1, len(values) - 1)
    at = min(inner, key=lambda i: abs(math.log(values[i] / center)))
    return tuple(values[at - 1 : at + 2])


def _vertex(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Where the parabola through three points is least, and its value there; the middle point must
    not be above the others."""
    left, right = x[1] - x[0], x[2] - x[1]
    down, up = (y[1] - y[0]) / left, (y[2] - y[1]) / right
    if up == down:
        return x[1], y[1]  # three equal losses
    # The slope is `down` midway between the first two, `up` midway between the last two.
    bend = (up - down) / (left + right)
    least = (x[0] + x[1]) / 2 - down / (2 * bend)
    return least, y[1] - bend * (least - x[1]) ** 2
