"""Compare runs in a figure and a table: `python -m mlx_mla.plot`."""

import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mlx_mla import cli
from mlx_mla.display import markdown_table
from mlx_mla.errors import UserError
from mlx_mla.files import read_toml
from mlx_mla.pictures import alone, draw, loss_axis, plain
from mlx_mla.training.metrics import METRICS, read_metrics

PROG = "python -m mlx_mla.plot"
CONFIG = "config.toml"
FORMATS = (".png", ".svg", ".pdf")


@dataclasses.dataclass(kw_only=True)
class PlotCommand:
    """Compare training runs: a figure of loss, speed and memory, and a table on stdout.

    Runs that differ only in --seed share a color.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, as mlx_mla.train writes them."""
    out: Path = Path("runs.png")
    """The figure: a file ending in .png, .svg or .pdf."""
    smooth: float = 0.6
    """Smoothing of the training loss, as in TensorBoard: the weight of the previous mean in the
    next value. 0: off."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(PlotCommand, argv, PROG)
    if not command.runs:
        raise UserError(f"no run given; see {PROG} --help")
    if not 0 <= command.smooth < 1:
        raise UserError(f"--smooth must be at least 0 and below 1, not {command.smooth}")
    if command.out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {command.out}: give a file ending in {', '.join(FORMATS)}")
    if not command.out.parent.is_dir():
        raise UserError(
            f"--out {command.out}: there is no folder {command.out.parent}; create it first"
        )
    runs = read_runs(command.runs)
    print(table(runs))
    plot_runs(runs, command.out, command.smooth)
    print(f"\nfigure: {command.out}")
    return 0


@dataclasses.dataclass
class RunMetrics:
    """The metrics of one run."""

    name: str
    """Path of the run folder from the folder that all runs have in common."""
    settings: Any
    """The settings without the seed, which are equal for repetitions of a run."""
    train: list[dict[str, Any]]
    val: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return max(
            self.train[-1:] + self.val[-1:], key=lambda row: (row["step"], row.get("seconds", 0.0))
        )

    @property
    def peak_memory_bytes(self) -> int:
        return max(row["peak_memory_bytes"] for row in self.train + self.val)

    @property
    def tokens_per_sec(self) -> float:
        """Median speed, without the first row if there are more, since it includes compilation."""
        return statistics.median(
            row["tokens_per_sec"] for row in self.train[1:] or self.train or self.val
        )


def read_runs(folders: Sequence[Path]) -> list[RunMetrics]:
    """Read the metrics of run folders.

    Raises:
        UserError: If a folder holds no run, no metrics or a damaged line, or is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    common = os.path.commonpath([folder.parent for folder in resolved])
    runs = []
    for i, folder in enumerate(folders):
        if resolved[i] in resolved[:i]:
            raise UserError(f"{folder}: is given twice; give each run once")
        path = folder / METRICS
        if not path.is_file():
            if not folder.is_dir():
                raise UserError(
                    f"{folder}: no such folder; give the run folders that mlx_mla.train wrote"
                )
            if not (folder / CONFIG).is_file():
                raise UserError(
                    f"{folder}: holds no run (no {METRICS}); give a folder that was train's --out"
                )
            raise UserError(f"{path}: no such file; the run has logged nothing yet")
        rows = read_metrics(path)
        if not rows:
            raise UserError(f"{path}: is empty; the run has logged nothing yet")
        train, val = (
            [row for row in rows if row.get("split") == split] for split in ("train", "val")
        )
        if not train and not val:
            raise UserError(f"{path}: holds no loss; the run has logged nothing yet")
        name = os.path.relpath(resolved[i], common)
        settings = read_toml(folder / CONFIG) if (folder / CONFIG).is_file() else {"run": name}
        settings.pop("seed", None)
        runs.append(RunMetrics(name, settings, train, val))
    return runs


def table(runs: Sequence[RunMetrics]) -> str:
    """Table of the steps, tokens, losses, speed and memory of runs, as text."""
    header = [
        "run",
        "steps",
        "tokens",
        "last val",
        "best val (step)",
        "tok/s",
        "MFU",
        "peak memory",
        "time",
    ]
    rows = []
    for run in runs:
        best = min(run.val, key=lambda row: row["loss"], default=None)
        shares = [row["mfu"] for row in run.train if "mfu" in row]
        seconds = run.last.get("seconds")
        rows.append(
            [
                run.name,
                f"{run.last['step']:,}",
                f"{run.last['tokens']:,}",
                f"{run.val[-1]['loss']:.4f}" if run.val else "-",
                "-" if best is None else f"{best['loss']:.4f} ({best['step']:,})",
                f"{run.tokens_per_sec:,.0f}",
                f"{statistics.median(shares):.1%}" if shares else "-",
                f"{run.peak_memory_bytes / 2**20:,.0f} MiB",
                "-" if seconds is None else f"{seconds:,.0f} s",
            ]
        )
    return "\n".join(markdown_table(header, rows, padded=True))


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its bias towards 0, as in TensorBoard."""
    mean, out = 0.0, []
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


WIDTH = 130
"""Characters that fit into a line of the legend."""


def plot_runs(runs: Sequence[RunMetrics], out: Path, smooth: float) -> None:
    """Draw loss against tokens and time, speed, and peak memory of runs into a file.

    Raises:
        UserError: If the file cannot be written.
    """
    draw(out, lambda fig: _draw_runs(fig, runs, smooth), figsize=(10, 7), layout="constrained")


def _draw_runs(fig: Any, runs: Sequence[RunMetrics], smooth: float) -> None:
    from matplotlib.lines import Line2D

    panels = fig.subplots(2, 2, height_ratios=(3, 2))
    (by_tokens, by_time), (speed, memory) = panels
    unit, divisor = _time_unit(max(run.last.get("seconds", 0.0) for run in runs))
    handles = []
    for run, (color, dashes) in zip(runs, _styles(runs)):
        line: dict[str, Any] = {"color": color, "linestyle": dashes}
        handles.append(Line2D([], [], **line, lw=2, label=plain(run.name)))
        for axes, key, scale in ((by_tokens, "tokens", 1), (by_time, "seconds", divisor)):
            train, val = (
                [(row[key] / scale, row["loss"]) for row in rows if key in row]
                for rows in (run.train, run.val)
            )
            if train:
                xs, losses = zip(*train)
                if smooth:
                    axes.plot(xs, losses, color=color, lw=0.6, alpha=0.3)
                axes.plot(xs, smoothed(losses, smooth), **line, **alone(xs), lw=1.1, alpha=0.75)
            if val:
                axes.plot(*zip(*val), **line, lw=1.8, marker="o", ms=4)
        if rows := run.train[1:] or run.train:
            speed.plot(
                [row["tokens"] for row in rows],
                [row["tokens_per_sec"] for row in rows],
                **line,
                **alone(rows),
                lw=1.1,
            )
    for axes in (by_tokens, by_time):
        loss_axis(axes)
    by_tokens.set(xlabel="tokens", ylabel="loss (nats per token)", title="loss against tokens")
    by_time.set(xlabel=f"time in the run ({unit})", title="loss against time")
    if without := [run.name for run in runs if "seconds" not in run.last]:
        by_time.text(
            0.5,
            0.5,
            "no times logged for\n" + "\n".join(map(plain, without)),
            transform=by_time.transAxes,
            ha="center",
        )
    for axes in (by_tokens, speed):
        axes.xaxis.set_major_formatter(lambda x, _: _count(x))
    speed.set(xlabel="tokens", ylabel="tokens per second", title="speed, training", ylim=(0, None))
    speed.yaxis.set_major_formatter(lambda y, _: _count(y))
    _memory_bars(memory, runs)
    for axes in (by_tokens, by_time, speed):
        axes.grid(alpha=0.3, which="major")
    train_label = f"training (smoothed, {smooth:g})" if smooth else "training"
    handles += [
        Line2D([], [], color="0.4", lw=1.1, label=train_label),
        Line2D([], [], color="0.4", lw=1.8, marker="o", ms=4, label="validation"),
    ]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(4, len(handles), WIDTH // (longest + 8)))
    fig.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _styles(runs: Sequence[RunMetrics]) -> list[tuple[Any, Any]]:
    """Color and dashes of each run: repetitions have the color of the first, and other dashes."""
    import matplotlib

    colormap: Any = matplotlib.colormaps["tab10" if len(runs) <= 10 else "tab20"]
    own_dashes = ((0, lengths) for lengths in ((8, 3), (1, 4), (6, 2, 1, 2, 1, 2), (3, 1)))
    dashes = ("-", "--", ":", "-.", *own_dashes)
    settings = [run.settings for run in runs]
    styles = []
    for i, own in enumerate(settings):
        color = colormap.colors[settings.index(own) % len(colormap.colors)]
        styles.append((color, dashes[settings[:i].count(own) % len(dashes)]))
    return styles


def _memory_bars(axes: Any, runs: Sequence[RunMetrics]) -> None:
    sizes = [run.peak_memory_bytes / 2**20 for run in runs]
    bars = axes.barh(
        range(len(runs)), sizes, color=[color for color, _ in _styles(runs)], height=0.45
    )
    axes.bar_label(bars, [f"{size:,.0f} MiB" for size in sizes], padding=3)
    axes.set_yticks(range(len(runs)), [plain(run.name, 24) for run in runs])
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set(xlabel="MiB", title="peak memory")


def _time_unit(seconds: float) -> tuple[str, float]:
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 3 * size:
            return unit, size
    return "seconds", 1.0


def _count(n: float) -> str:
    """Format a number compactly: 25k, 1.5M, 10B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:g}{letter}"
    return f"{n:g}"


if __name__ == "__main__":
    sys.exit(main())
