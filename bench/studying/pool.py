"""Runs side by side, with progress for the whole study."""

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from bench.studying.agenda import Agenda, flops
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
    """Trains what an agenda asks for, `jobs` runs at a time, with a line for every run.

    Args:
        runs: The folder of all runs.
        jobs: How many at a time; each gets its share of the cores.
        console: Where progress is shown.
    """

    def __init__(self, runs: Path, jobs: int, console: Console):
        self._runs, self._jobs, self._console = runs, jobs, console
        self._threads = max(1, cores() // jobs)
        self._active: list[Trainer] = []
        self._began = time.monotonic()
        self._done = 0.0
        """FLOPs of the runs that this process has finished."""
        self._finished = 0

    def work(
        self, ask: Callable[[], Agenda], finished: Callable[[Trainer, Outcome], None]
    ) -> int | None:
        """Train until nothing is left to do.

        Args:
            ask: What the finished runs leave to do; asked again after each.
            finished: Called with every run that has finished.

        Returns:
            The signal that stopped it, after all runs have saved; None at the end.

        Raises:
            UserError: If a run failed; the others have saved before.
        """
        with catch_signals(second_acts=True) as caught:
            try:
                while not caught:
                    plan = ask()
                    self._fill(plan)
                    if not self._active:
                        return None
                    while not caught and not self._collect(plan, finished):
                        time.sleep(POLL_SECONDS)
            finally:
                for trainer in self._active:
                    trainer.stop()
                for trainer in self._active:
                    trainer.wait()
        return caught[0]

    def _fill(self, plan: Agenda) -> None:
        active = {trainer.run.key for trainer in self._active}
        for run in plan.ready:
            if len(self._active) < self._jobs and run.key not in active:
                trainer = Trainer(run, self._runs, self._threads)
                self._active.append(trainer)
                waits = " (waits for a trainer that was left behind)" if trainer.waits else ""
                self._say(f"started  {run.name}{waits}", plan)

    def _collect(self, plan: Agenda, finished: Callable[[Trainer, Outcome], None]) -> bool:
        """Whether any run has finished since the last call."""
        any_finished = False
        for trainer in list(self._active):
            outcome = trainer.poll()
            if outcome is not None:
                self._active.remove(trainer)
                self._finished += 1
                self._done += _work(trainer, trainer.run.config.steps)
                finished(trainer, outcome)
                loss = outcome.get("diverged") or f"loss {outcome['loss']:.4f}"
                self._say(f"finished {trainer.run.name}  {loss}", plan)
                any_finished = True
        return any_finished

    def _say(self, text: str, plan: Agenda) -> None:
        """A line, with how long the rest takes at the speed so far."""
        here = sum(_work(trainer, trainer.step) for trainer in self._active)
        left = sum(map(flops, [*plan.ready, *plan.later])) - here
        done, eta = self._done + here, "not known yet"
        if self._finished and done:  # a run that another process trained is none of our work
            hours = max(0.0, left) * (time.monotonic() - self._began) / done / 3600
            eta = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        self._console.print(
            f"{text}  [{self._finished} done, ETA {eta}]",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _work(trainer: Trainer, step: int) -> float:
    """FLOPs of a run that this process has spent."""
    return flops(trainer.run) * max(0, step - trainer.began_at) / trainer.run.config.steps
