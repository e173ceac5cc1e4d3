"""Runs side by side, with progress for the whole study."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from bench.studying.agenda import Agenda, flops
from bench.studying.plan import Run
from bench.studying.results import Outcome
from bench.studying.trainer import Trainer
from mlx_mla.errors import UserError
from mlx_mla.training.recovery import catch_signals

POLL_SECONDS = 0.5


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Refuse a second study on the same folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}; give another --out") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"{out}: another study writes there; wait for it, or stop it") from None
    finally:
        os.close(lock)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Pool:
    """Trains what an agenda asks for, `jobs` runs at a time.

    Args:
        runs: The folder of all runs.
        jobs: How many at a time; each gets its share of the cores.
        console: Where progress is shown: a bar on a terminal, else a line a run.
    """

    def __init__(self, runs: Path, jobs: int, console: Console):
        self._runs, self._jobs, self._console = runs, jobs, console
        self._threads = max(1, cores() // jobs)
        self._active: list[Trainer] = []

    def work(
        self, ask: Callable[[], Agenda], finished: Callable[[Trainer, Outcome], None]
    ) -> int | None:
        """Go on until nothing is left to do.

        Args:
            ask: What the finished runs leave to do; asked again after each.
            finished: Called with every run that has finished.

        Returns:
            The signal that stopped it, after all runs have saved; None at the end.

        Raises:
            UserError: If a run failed; the others have saved before.
        """
        with catch_signals(second_acts=True) as caught, self._progress(ask()) as progress:
            try:
                while not caught:
                    plan = ask()
                    self._fill(plan, progress)
                    if not self._active:
                        return None
                    while not caught and not self._collect(finished, progress):
                        progress.show([*plan.ready, *plan.later], self._active)
                        time.sleep(POLL_SECONDS)
            finally:
                for trainer in self._active:
                    trainer.stop()
                for trainer in self._active:
                    trainer.wait()
        return caught[0]

    def _fill(self, plan: Agenda, progress: "_Progress") -> None:
        active = {trainer.run.key for trainer in self._active}
        for run in plan.ready:
            if len(self._active) < self._jobs and run.key not in active:
                self._active.append(Trainer(run, self._runs, self._threads))
                waits = " (waits for a trainer that was left behind)"
                progress.say(f"started  {run.name}{waits if self._active[-1].waits else ''}")

    def _collect(self, finished: Callable[[Trainer, Outcome], None], progress: "_Progress") -> bool:
        """Whether any run has finished since the last call."""
        any_finished = False
        for trainer in list(self._active):
            outcome = trainer.poll()
            if outcome is not None:
                self._active.remove(trainer)
                progress.finished(trainer)
                finished(trainer, outcome)
                loss = outcome.get("diverged") or f"loss {outcome['loss']:.4f}"
                progress.say(f"finished {trainer.run.name}  {loss}")
                any_finished = True
        return any_finished

    def _progress(self, plan: Agenda) -> "_Progress":
        return _Progress(self._console, [*plan.ready, *plan.later])


@dataclasses.dataclass
class _Work:
    done: float
    left: float


class _Progress:
    """How much is done, in FLOPs, and how long the rest takes at the speed so far."""

    def __init__(self, console: Console, runs: list[Run]):
        self._console, self._began = console, time.monotonic()
        self._finished = 0.0
        self._count = 0
        self._left = len(runs)
        self._eta = "not known yet"
        self._bar = Progress(
            TextColumn("study"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("study", total=1.0, text="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, unfinished: list[Run], active: list[Trainer]) -> None:
        """Report where the study stands."""
        work = self._work(unfinished, active)
        seconds = time.monotonic() - self._began
        self._left = len(unfinished)
        if work.done:
            self._eta = _duration(work.left * seconds / work.done)
        text = f"{self._count} done, {self._left} to go, ETA {self._eta}"
        share = work.done / (work.done + work.left) if work.done else 0.0
        self._bar.update(self._task, completed=share, text=text)

    def finished(self, trainer: Trainer) -> None:
        self._count += 1
        self._finished += _share(trainer, trainer.run.config.steps)

    def say(self, text: str) -> None:
        """A line; where no bar stands, with what the bar would say."""
        where = "" if self._console.is_terminal else f"  [{self._count} done, ETA {self._eta}]"
        self._console.print(text + where, markup=False, highlight=False, soft_wrap=True)

    def _work(self, unfinished: list[Run], active: list[Trainer]) -> _Work:
        now = {t.run.key: (t, t.step) for t in active}
        here = sum(_share(t, step) for t, step in now.values())
        gone = sum(flops(t.run) * min(1.0, step / t.run.config.steps) for t, step in now.values())
        return _Work(self._finished + here, sum(map(flops, unfinished)) - gone)


def _share(trainer: Trainer, step: int) -> float:
    """FLOPs that this process has seen of a run."""
    run = trainer.run
    return flops(run) * max(0, step - trainer.began_at) / run.config.steps


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def stopped_by(number: int) -> str:
    """The name of a signal, for people."""
    return signal.Signals(number).name
