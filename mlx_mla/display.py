"""Progress of a run: a progress bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence, Set
from types import TracebackType
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
        header: The column titles.
        rows: The cells of each row, converted with `str`.
        padded: Align the columns with spaces, for tables that are also read on a terminal.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    if len(cells) == 1:
        return []
    widths = [max(map(len, column)) if padded else 0 for column in zip(*cells)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in cells
    ]
    rule = "|".join("-" * (width + 2 if padded else 3) for width in widths)
    return [lines[0], f"|{rule}|", *lines[1:]]


class TrainDisplay:
    """Progress of a training run.

    Args:
        console: Where to write. A terminal gets a progress bar; anything else gets a line for every
            twentieth of the run.
        done: Steps that are already finished.
        total: Steps of the whole run.
    """

    def __init__(self, console: Console, done: int, total: int):
        self.console = console
        self._total = total
        self._every = max(1, total // 20)
        self._val = math.nan
        self._bar = Progress(
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
        )
        self._task = self._bar.add_task(
            "train", total=total, completed=done, loss=math.nan, val="-", tps=0.0, mfu=0.0
        )

    def __enter__(self) -> "TrainDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(
        self, step: int, loss: float, tokens_per_sec: float, mfu: float, eta_seconds: float | None
    ) -> None:
        """Report a finished step; `eta_seconds` is None while it is unknown."""
        self._bar.update(self._task, completed=step, loss=loss, tps=tokens_per_sec, mfu=mfu)
        if not self.console.is_terminal and (step % self._every == 0 or step == 1):
            eta = (
                ""
                if eta_seconds is None
                else f"  ETA {int(eta_seconds) // 60}:{int(eta_seconds) % 60:02d}"
            )
            self.say(
                f"step {step}/{self._total}  loss {loss:.3f}  {tokens_per_sec:,.0f} tok/s  MFU "
                f"{mfu:.0%}{eta}"
            )

    def validation(self, step: int, loss: float) -> None:
        """Report a validation loss."""
        self._bar.update(self._task, val=f"{loss:.3f}")
        self.say(f"step {step}/{self._total}  validation loss {loss:.4f}")

    def sample(self, step: int, text: str) -> None:
        """Show a sample of text."""
        self.say(f"--- sample after step {step} ---\n{text}\n--------------")

    def task(self, step: int, name: str, metrics: Mapping[str, Any]) -> None:
        """Report a task's metrics with their standard errors."""
        values = []
        for key in (key for key in metrics if f"{key}_stderr" in metrics):
            spread = f"± {metrics[f'{key}_stderr']:.2g}"
            if f"{key}_low" in metrics:  # a proportion, whose interval is never empty
                spread = f"({metrics[f'{key}_low']:.3g} - {metrics[f'{key}_high']:.3g})"
            values.append(f"{key} {metrics[key]:.4g} {spread}")
        self.say(f"step {step}/{self._total}  {name}  {'  '.join(values)}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class PrepareDisplay:
    """Progress of a preparation.

    Args:
        console: Where to write. A terminal gets a progress bar; anything else gets a line every ten
            seconds.
        total: Size of all sources, in the unit of `read`. 0: unknown, so no ETA is shown.
    """

    def __init__(self, console: Console, total: float):
        self.console = console
        self._total = total
        self._began = self._said = time.monotonic()
        self._bytes = self._tokens = 0
        self._read: dict[str, float] = {}
        # The work of earlier runs counts as progress, but not towards the speed.
        self._before = 0.0
        self._begun = set[str]()
        self._start: dict[str, float] = {}
        self._bar = Progress(
            TextColumn("prepare"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TextColumn("{task.fields[speed]:.1f} MB/s"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(
            "prepare", total=total or None, tokens=0, speed=0.0, eta="-"
        )

    def __enter__(self) -> "PrepareDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def resume(self, done: float, sources: Set[str]) -> None:
        """Count the work of earlier runs as progress.

        Args:
            done: Size of the sources that were read completely.
            sources: Names of the sources that were read in part.
        """
        self._before, self._begun = done, set(sources)

    def read(self, source: str, done: float) -> None:
        """Report how far a source has been read."""
        if source in self._begun:
            self._begun.remove(source)
            self._before += done
            self._start[source] = done
        self._read[source] = done - self._start.get(source, 0.0)

    def tokens(self, size: int, count: int) -> None:
        """Report that `size` bytes of text became `count` tokens."""
        self._bytes += size
        self._tokens += count
        elapsed = max(1e-6, time.monotonic() - self._began)
        speed, now = self._bytes / 1e6 / elapsed, sum(self._read.values())
        left = self._total - self._before - now
        eta = "-" if not self._total or now <= 0 else _clock(max(0.0, left) / now * elapsed)
        done = self._before + now
        self._bar.update(self._task, completed=done, tokens=self._tokens, speed=speed, eta=eta)
        if not self.console.is_terminal and time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            share = f"{100 * done / self._total:3.0f} %  " if self._total else ""
            text = f"{share}{self._tokens:,} tokens  {speed:.1f} MB/s  ETA {eta}"
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d}"
    )
