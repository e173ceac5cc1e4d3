"""Plot the loss of a run."""

import json
import math
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an unfinished last line (a killed run) is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def plot_loss(metrics: Path, out: Path, title: str) -> None:
    """Draw training and validation loss against steps into a PNG.

    Both axes are logarithmic where the run is long enough for that to read better: most of the fall
    is in the first steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, NullFormatter

    rows = read_metrics(metrics)
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for split, style in (("train", {"lw": 1.2, "alpha": 0.8}), ("val", {"lw": 1.8, "marker": "o", "ms": 4})):
        points = [(r["step"], r["loss"]) for r in rows if r["split"] == split and math.isfinite(r["loss"])]
        if points:
            ax.plot(*zip(*points), label="training" if split == "train" else "validation", **style)
    last = max((r["step"] for r in rows), default=0)
    if last >= 100:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yscale("log")
    # Losses rarely span a decade, so plain numbers read better than powers of ten.
    ax.yaxis.set_major_locator(MaxNLocator(8))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    ax.grid(alpha=0.3, which="major")
    if ax.lines:
        ax.legend()
    temporary = out.with_name(f".{out.name}")
    fig.savefig(temporary, dpi=120, format="png")
    plt.close(fig)
    temporary.replace(out)
