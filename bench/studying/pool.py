"""What a study has still to run, and running it side by side, with progress for the whole study."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench.harness import cores
from bench.studying.plan import Run, Study
from bench.studying.results import Outcome, Results
from bench.studying.trainer import Trainer
from mlx_mla.model.estimate import forward_flops_per_token
from mlx_mla.training.recovery import catch_signals

POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What to run next, and what will follow."""

    ready: list[Run]
    """Runs that wait for nothing, in the order to start them."""
    later: list[Run]
    """Runs that wait for others; their rates and stds are placeholders."""


def agenda(study: Study, results: Results) -> Agenda:
    """What the finished runs leave to do.

    Sizes come in the order of the file; in each, all arms are tuned before any seed, then seed by
    seed all arms, so that whatever has finished can be compared.
    """
    ready: list[Run] = []
    later: list[Run] = []
    for size in dict.fromkeys(cell.size for cell in study.cells):
        repeated: list[tuple[int, Run]] = []
        for cell in (cell for cell in study.cells if cell.size == size):
            found = results.tuning(cell)
            begun = [stage.what for stage in found.stages]
            if found.wanted:
                ready += found.wanted
                later += [r for what, own in cell.least.items() if what not in begun for r in own]
            repeated += [(i, r) for i, r in enumerate(found.finals) if results.get(r) is None]
        ready += [run for _, run in sorted(repeated, key=lambda pair: pair[0])]
    # Budgets that are tuned with the same tokens share their tuning runs.
    return Agenda(list({run.key: run for run in ready}.values()), later)


def flops(run: Run) -> float:
    """Training FLOPs of a run, from which the remaining time is estimated."""
    return 3.0 * forward_flops_per_token(run.config.model, run.config.context) * run.tokens


class Pool:
    """Trains what an agenda asks for, `jobs` runs at a time, with a line for every run.

    Args:
        runs: The folder of all runs.
        jobs: How many at a time; each gets its share of the cores.
        console: Where progress is shown.
    """

    def __init__(self, runs: Path, jobs: int, console: Console):
        self._runs, self._jobs, self._console = runs, jobs, console
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
                trainer = Trainer(run, self._runs, max(1, cores() // self._jobs))
                self._active.append(trainer)
                waits = " (waits for a trainer that was left behind)" if trainer.waits else ""
                self._say(f"started  {run.name}{waits}", plan)

    def _collect(self, plan: Agenda, finished: Callable[[Trainer, Outcome], None]) -> bool:
        """Whether any run has finished since the last call."""
        before = self._finished
        for trainer in list(self._active):
            outcome = trainer.poll()
            if outcome is not None:
                self._active.remove(trainer)
                self._finished += 1
                self._done += _work(trainer, trainer.run.config.steps)
                finished(trainer, outcome)
                loss = outcome.get("diverged") or f"loss {outcome['loss']:.4f}"
                self._say(f"finished {trainer.run.name}  {loss}", plan)
        return self._finished > before

    def _say(self, text: str, plan: Agenda) -> None:
        """A line, with how long the rest takes at the speed so far."""
        here = sum(_work(trainer, trainer.step) for trainer in self._active)
        left = sum(map(flops, [*plan.ready, *plan.later])) - here
        done, eta = self._done + here, "not known yet"
        if self._finished and done:  # a run that another process trained is none of our work
            hours = max(0.0, left) * (time.monotonic() - self._began) / done / 3600
            eta = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
        self._console.print(f"{text}  [{self._finished} done, ETA {eta}]")


def _work(trainer: Trainer, step: int) -> float:
    """FLOPs of a run that this process has spent."""
    return flops(trainer.run) * max(0, step - trainer.began_at) / trainer.run.config.steps
