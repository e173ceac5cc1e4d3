"""Progress of a run: a progress bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def plain_console(stderr: bool = False) -> Console:
    """A console that prints text verbatim, without markup or line breaks."""
    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=True)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, padded: bool = False
) -> list[str]:
    """The lines of a Markdown table; an empty list if there are no rows.

    Args:
        rows: The cells of each row, converted with `str`.
        padded: Align the columns with spaces, for tables that are also read on a terminal.
    """
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    if len(cells) == 1:
        return []
    widths = [max(map(len, column)) if padded else 0 for column in zip(*cells)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in cells
    ]
    rule = "|".join("-" * (width + 2 if padded else 3) for width in widths)
    return [lines[0], f"|{rule}|", *lines[1:]]


class TrainDisplay(Progress):
    """Progress of a training run: a bar on a terminal, elsewhere a line for every twentieth.

    Args:
        console: A `plain_console`.
        done: Steps that are already finished.
        total: Steps of the whole run.
    """

    def __init__(self, console: Console, done: int, total: int):
        super().__init__(
            TextColumn("train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("val {task.fields[val]}"),
            TextColumn("{task.fields[tps]:,.0f} tok/s"),
            TextColumn("MFU {task.fields[mfu]:.0%}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=600,  # seconds; a step may take minutes
        )
        self._total, self._every = total, max(1, total // 20)
        self._bar = self.add_task(
            "train", total=total, completed=done, loss=math.nan, val="-", tps=0.0, mfu=0.0
        )

    def step(self, step: int, loss: float, tokens_per_sec: float, mfu: float) -> None:
        """Report a finished step."""
        self.update(self._bar, completed=step, loss=loss, tps=tokens_per_sec, mfu=mfu)
        if not self.console.is_terminal and (step % self._every == 0 or step == 1):
            left = self.tasks[0].time_remaining
            eta = "" if left is None else f"  ETA {_clock(left)}"
            self._say(step, f"loss {loss:.3f}  {tokens_per_sec:,.0f} tok/s  MFU {mfu:.0%}{eta}")

    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss."""
        self.update(self._bar, val=f"{loss:.3f}")
        self._say(step, f"validation loss {loss:.4f}")

    def sample(self, step: int, text: str) -> None:
        """Show a sample of text."""
        self.console.print(f"--- sample after step {step} ---\n{text}\n--------------")

    def task(self, step: int, name: str, metrics: Mapping[str, Any]) -> None:
        """Report a task's metrics with their standard errors."""
        values = []
        for key in (key for key in metrics if f"{key}_stderr" in metrics):
            spread = f"± {metrics[f'{key}_stderr']:.2g}"
            if f"{key}_low" in metrics:  # a proportion, whose interval is never empty
                spread = f"({metrics[f'{key}_low']:.3g} - {metrics[f'{key}_high']:.3g})"
            values.append(f"{key} {metrics[key]:.4g} {spread}")
        self._say(step, f"{name}  {'  '.join(values)}")

    def _say(self, step: int, text: str) -> None:
        self.console.print(f"step {step}/{self._total}  {text}")


class PrepareDisplay(Progress):
    """Progress of a preparation: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        console: A `plain_console`.
        total: Size of all sources, in the unit of `read`. 0: unknown, so no ETA is shown.
    """

    def __init__(self, console: Console, total: float):
        super().__init__(
            TextColumn("prepare"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TextColumn("{task.fields[speed]:.1f} MB/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._began = self._said = time.monotonic()
        self._bytes = self._tokens = 0
        self._read: dict[str, float] = {}
        self._bar = self.add_task("prepare", total=total or None, tokens=0, speed=0.0)

    def read(self, source: str, done: float) -> None:
        """Report how far a source has been read, by this process and by earlier ones."""
        self._read[source] = done

    def tokens(self, size: int, count: int) -> None:
        """Report that `size` bytes of text became `count` tokens."""
        self._bytes += size
        self._tokens += count
        now, done = time.monotonic(), sum(self._read.values())
        speed = self._bytes / 1e6 / max(1e-6, now - self._began)
        self.update(self._bar, completed=done, tokens=self._tokens, speed=speed)
        if not self.console.is_terminal and now - self._said >= 10:
            self._said, task = now, self.tasks[0]
            share = "" if task.total is None else f"{task.percentage:3.0f} %  "
            eta = "-" if task.time_remaining is None else _clock(task.time_remaining)
            self.console.print(f"{share}{self._tokens:,} tokens  {speed:.1f} MB/s  ETA {eta}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, of_hour = divmod(minutes, 60)
    return f"{hours}:{of_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
