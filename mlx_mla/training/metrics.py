"""`metrics.jsonl`: a line for each logged step of a run; and `samples.jsonl`."""

import math
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from mlx_mla.fields import Count, NonNegativeFloat, value_of
from mlx_mla.files import REMEDY, finite, json_lines
from mlx_mla.pictures import alone, draw, loss_axis, plain

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class _Line(TypedDict):
    """A line of metrics.jsonl; that of a task holds its metrics beside these."""

    step: Count
    split: NotRequired[str]
    """train, val, or the name of a task."""
    lr: NotRequired[float]
    mfu: NotRequired[float]
    seconds: NotRequired[NonNegativeFloat]


class _LossLine(_Line):
    loss: float
    tokens: Count
    tokens_per_sec: float
    peak_memory_bytes: Count


class _Sample(TypedDict):
    step: Count
    text: NotRequired[str]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: `step` and `split` of each, `loss` of training and validation.

    An unfinished last line, which a killed run left, is left out. No file is no lines.

    Raises:
        UserError: Naming the line and the field of a value that no run writes.
    """
    rows = []
    for where, row in json_lines(path):
        if isinstance(row, dict) and row.get("split") in ("train", "val"):
            rows.append(value_of(_LossLine, row, where, REMEDY))
        else:  # of a task on one item: the error is NaN, and a perplexity can be infinite
            rows.append(value_of(_Line, finite(row), where, REMEDY))
    return rows


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a samples.jsonl; as `read_metrics`."""
    return [value_of(_Sample, row, where, REMEDY) for where, row in json_lines(path)]


def perplexity_text(loss: float) -> str:
    """The perplexity of a loss in nats, with the figures that mean something."""
    if loss >= math.log(1e6):  # of a model that has learned nothing, the order of magnitude
        return f"{math.exp(loss):.2g}" if loss < 700 else "over 1e304"
    return f"{math.exp(loss):.2f}"


def plot_loss(metrics: Path, out: Path, title: str) -> None:
    """Draw training and validation loss against steps into a PNG; a failure is one warning."""

    def paint(fig: Any) -> None:
        rows = read_metrics(metrics)
        ax = fig.subplots()
        for split, style in (
            ("train", {"label": "training", "lw": 1.2, "alpha": 0.8}),
            ("val", {"label": "validation", "lw": 1.8, "marker": "o", "ms": 4}),
        ):
            points = [(row["step"], row["loss"]) for row in rows if row.get("split") == split]
            if points:
                ax.plot(*zip(*points), **{**style, **alone(points)})
        loss_axis(ax)
        ax.set(xlabel="step", ylabel="loss (nats per token)", title=plain(title))
        ax.grid(alpha=0.3, which="major")
        if ax.lines:
            ax.legend()

    draw(out, paint, optional=True, figsize=(7, 4.5), layout="constrained")
