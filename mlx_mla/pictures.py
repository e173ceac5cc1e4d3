"""What pictures share, and the picture of a run's loss."""

import math
import warnings
from pathlib import Path
from typing import Any

from mlx_mla.files import atomic_file
from mlx_mla.metrics import read_metrics

LONGEST_NAME = 60


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; imported here, since that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain(name: str) -> str:
    """A name as matplotlib shows it: dollars are no formula, and one line is not too long."""
    line = "".join(c if c.isprintable() else "?" for c in name)
    if len(line) > LONGEST_NAME:
        line = f"...{line[3 - LONGEST_NAME :]}"  # the end of a path tells most
    return line.replace("$", r"\$")


def save(fig: Any, out: Path) -> None:
    """Replace a picture in one step; UserError if it cannot be written."""
    import matplotlib.pyplot as plt

    try:
        with atomic_file(out) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fonts lack characters of some names
            fig.savefig(file, dpi=120, format=out.suffix[1:].lower())
    finally:
        plt.close(fig)


def loss_axis(ax: Any) -> None:
    """Logarithmic losses with plain numbers; logarithmic x, too, where it spans two decades."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    xs = [x for line in ax.lines for x in line.get_xdata() if x > 0]
    if xs and max(xs) >= 100 * min(xs):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yscale("log")
    # Losses rarely span a decade, so plain numbers read better than powers of ten.
    ax.yaxis.set_major_locator(MaxNLocator(8))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def plot_loss(metrics: Path, out: Path, title: str) -> None:
    """Draw training and validation loss against steps into a PNG.

    Both axes are logarithmic where the run is long enough for that to read better: most of the fall
    is in the first steps.
    """
    plt = pyplot()
    rows = read_metrics(metrics)
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for split, style in (
        ("train", {"lw": 1.2, "alpha": 0.8}),
        ("val", {"lw": 1.8, "marker": "o", "ms": 4}),
    ):
        points = [
            (r["step"], r["loss"])
            for r in rows
            if r.get("split") == split and math.isfinite(r["loss"])
        ]
        if points:
            ax.plot(*zip(*points), label="training" if split == "train" else "validation", **style)
    loss_axis(ax)
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=plain(title))
    ax.grid(alpha=0.3, which="major")
    if ax.lines:
        ax.legend()
    save(fig, out)
