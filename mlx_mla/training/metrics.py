"""`metrics.jsonl`: a line for each logged step of a run; and `samples.jsonl`."""

import math
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError
from mlx_mla.files import parse_json_object
from mlx_mla.pictures import draw, loss_axis, plain

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_FIGURES = ("loss", "lr", "tokens", "tokens_per_sec", "peak_memory_bytes", "mfu", "seconds")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an unfinished last line (a killed run) is left out.

    Raises:
        UserError: For a line that is no JSON object with a step, or has words for figures, naming
            it.
    """
    rows = []
    if path.is_file():
        for number, line in enumerate(_lines(path), 1):
            if line.endswith(b"\n"):
                where = f"{path}, line {number}"
                try:
                    row = parse_json_object(line, where)
                except UserError:
                    row = {}
                if not _is_row(row):
                    raise UserError(
                        f"{where}: damaged, it is no JSON object with a step and its figures; "
                        "remove the line"
                    )
                rows.append(row)
    return rows


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None


def _is_row(row: dict[str, Any]) -> bool:
    step, split = row.get("step"), row.get("split", "")
    figures = [value for key, value in row.items() if key in _FIGURES]
    return (
        type(step) is int
        and step >= 0
        and isinstance(split, str)
        and (split not in ("train", "val") or "loss" in row)
        and all(type(value) in (int, float) for value in figures)
    )


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
            points = [
                (row["step"], row["loss"])
                for row in rows
                if row.get("split") == split and math.isfinite(row["loss"])
            ]
            if points:
                ax.plot(*zip(*points), **style)
        loss_axis(ax)
        ax.set(xlabel="step", ylabel="loss (nats per token)", title=plain(title))
        ax.grid(alpha=0.3, which="major")
        if ax.lines:
            ax.legend()

    draw(out, paint, optional=True, figsize=(7, 4.5), layout="constrained")
