"""The learning-rate range test (Smith, arXiv:1506.01186): `python -m mlx_mla.train --lr-find`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_mla.backends.contract import TrainSession
from mlx_mla.data.windows import Batch
from mlx_mla.errors import UserError
from mlx_mla.pictures import pyplot, save

LOWEST, HIGHEST, STEPS = 1e-6, 1.0, 100
SMOOTHING = 0.9
"""Share of the running mean that a step's loss leaves."""


class Point(NamedTuple):
    """One step of the test."""

    rate: float
    loss: float
    """Smoothed loss, nats per token."""


def sweep(
    session: TrainSession, batches: Callable[[int], Sequence[Batch]], steps: int = STEPS
) -> list[Point]:
    """Train at rates that rise from 1e-6 to 1 by equal factors, until the loss has risen by half or
    is no number.

    Args:
        session: A fresh model; it is spoilt by this.
        batches: The batches of a step, by its number.
    """
    points: list[Point] = []
    mean, best = 0.0, math.inf
    for step in range(steps):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / max(1, steps - 1))
        loss = session.step(step, rate, batches(step)).loss
        if not math.isfinite(loss):
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth = mean / (1 - SMOOTHING ** (step + 1))
        points.append(Point(rate, smooth))
        best = min(best, smooth)
        if smooth > 1.5 * best:
            break
    return points


def suggestion(points: Sequence[Point]) -> float:
    """A tenth of the rate at which the smoothed loss was lowest, which smoothing reports too late.

    Raises:
        UserError: If the loss never fell.
    """
    best = min(points, key=lambda p: p.loss, default=None)
    if best is None or best.loss >= points[0].loss:
        raise UserError(
            "--lr-find: the loss fell at no learning rate; check the data and the model's settings"
        )
    return best.rate / 10


def table(points: Sequence[Point], rows: int = 12) -> str:
    """Some of the points as lines."""
    every = max(1, len(points) // rows)
    return "\n".join(f"learning rate {p.rate:.2e}  loss {p.loss:.4f}" for p in points[::every])


def plot(points: Sequence[Point], suggested: float, path: Path) -> None:
    """Loss against learning rate as a PNG; UserError if it cannot be written."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ax.plot([p.rate for p in points], [p.loss for p in points])
    ax.axvline(suggested, color="tab:red", ls="--", label=f"suggested: {suggested:.1e}")
    low, first = min(p.loss for p in points), points[0].loss
    ax.set(xscale="log", ylim=(low - 0.1 * (first - low), first + 0.3 * (first - low)))
    ax.set(
        xlabel="learning rate",
        ylabel="smoothed loss (nats per token)",
        title="learning-rate range test",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    save(fig, path)
