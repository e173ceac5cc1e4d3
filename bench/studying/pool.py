"""What a study has left to run, and running it: each run in a process of its own, several side by
side, with progress for the whole study."""

import contextlib
import dataclasses
import fcntl
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from bench.studying.plan import Run, Study, settings
from bench.studying.results import LARGEST_LOSS, Outcome, Results, thinned
from mlx_mla import checkpoint
from mlx_mla.errors import UserError, last_line
from mlx_mla.files import parse_toml, write_text
from mlx_mla.machine import cores
from mlx_mla.model.estimate import forward_flops_per_token
from mlx_mla.model.presets import overlay, preset, to_toml
from mlx_mla.training.metrics import METRICS, read_metrics
from mlx_mla.training.recovery import catch_signals
from mlx_mla.training.run_folder import CONFIG, run_config

POLL_SECONDS = 0.5
THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    "VECLIB_MAXIMUM_THREADS",
)
"""Variables that set how many threads the libraries use."""


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What to run next, and what will follow."""

    ready: list[Run]
    """Runs that wait for nothing, in the order to start them."""
    later: list[Run]
    """Runs that wait for others; their rates and stds are placeholders."""


def agenda(study: Study, results: Results) -> Agenda:
    """What the finished runs leave to do.

    Sizes come in the order of the file; in each, what is ready of the tuning comes before any seed.
    Seed by seed the primary comparison and the baseline follow, then all other arms, so that
    whatever has finished can be compared.
    """
    first = set(study.arms)
    if study.primary is not None:  # its arm may not be known yet
        pair = results.primary(study)
        first = {study.baseline, study.primary[1], *(cell.arm for cell in pair or ())}
    ready: list[Run] = []
    later: list[Run] = []
    for size in dict.fromkeys(cell.size for cell in study.cells):
        repeated: list[tuple[bool, int, Run]] = []
        for cell in (cell for cell in study.cells if cell.size == size):
            found = results.tuning(cell)
            begun = [stage.what for stage in found.stages]
            if found.wanted:
                ready += found.wanted
                later += [r for what, own in cell.least.items() if what not in begun for r in own]
            finals = enumerate(found.finals)
            last = cell.arm not in first
            repeated += [(last, i, r) for i, r in finals if results.get(r) is None]
        ready += [run for *_, run in sorted(repeated, key=lambda x: x[:2])]
    # Budgets that are tuned with the same tokens share their tuning runs.
    return Agenda(list({run.key: run for run in ready}.values()), later)


def flops(run: Run) -> float:
    """Training FLOPs of a run, from which the remaining time is estimated."""
    return 3.0 * forward_flops_per_token(run.config.model, run.config.context) * run.tokens


class Trainer:
    """Trains a run in a folder by `python -m mlx_mla.train --auto-resume`.

    A killed study leaves its trainers running. Each holds the lock of its run's folder, which a new
    trainer waits for, so no two write one folder.

    Args:
        run: What to train.
        runs: The folder of all runs.
        threads: Threads of the process.
        data: Fingerprint of the data.
    """

    def __init__(self, run: Run, runs: Path, threads: int, data: str | None):
        self.run, self.folder, self._threads, self._data = run, runs / run.name, threads, data
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._beside(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise UserError(f"{self.folder}: cannot be written: {e.strerror}") from e
        self.began_at = self.step
        """The last step of an earlier start."""
        self.poll()

    @property
    def waits(self) -> bool:
        """Whether another process still trains this run."""
        return self._process is None

    @property
    def step(self) -> int:
        """The last step that was logged."""
        rows = read_metrics(self.folder / METRICS)
        return rows[-1]["step"] if rows else 0

    def poll(self) -> Outcome | None:
        """The outcome of the run once it has finished.

        Raises:
            UserError: If it ended otherwise than by finishing or diverging.
        """
        if self._process is None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            self._start()
            return None
        code = self._process.poll()
        if code is None:
            return None
        os.close(self._lock)
        if code == 0:
            return self._outcome(None)
        last = last_line(self._beside(".log").read_text(encoding="utf-8", errors="replace"))
        if code == 2 and last.startswith("error: training diverged"):
            return self._outcome(last.removeprefix("error: ").partition(" and was stopped")[0])
        how = f"was killed by signal {-code}" if code < 0 else last.removeprefix("error: ")
        raise UserError(
            f"{self.run.name}: {how}; its output is in {self._beside('.log')}; run the study again "
            "to resume"
        )

    def stop(self) -> None:
        """Tell the run to save a checkpoint and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait until the process has ended."""
        if self._process is not None:
            self._process.wait()

    def tidy(self) -> None:
        """Remove the files beside the folder of a finished run."""
        for suffix in (".toml", ".log", ".lock"):
            self._beside(suffix).unlink(missing_ok=True)

    def _start(self) -> None:
        make_room(self.folder, self.run, self._data)
        write_text(self._beside(".toml"), run_toml(self.run))
        command = [sys.executable, "-m", "mlx_mla.train", "--auto-resume"]
        command += ["--config", str(self._beside(".toml")), "--out", str(self.folder)]
        # Without a terminal, mlx_mla.train writes plain lines; they go to the log.
        with self._beside(".log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **dict.fromkeys(THREADS, str(self._threads))},
                pass_fds=[self._lock],  # the lock lasts as long as the trainer does
                start_new_session=True,  # Ctrl-C comes from us, once
            )  # fmt: skip

    def _outcome(self, diverged: str | None) -> Outcome:
        rows = read_metrics(self.folder / METRICS)
        train = [row for row in rows if row["split"] == "train"]
        held_out = [row for row in rows if row["split"] == "val"]
        finished = bool(held_out) and held_out[-1]["step"] == self.run.config.steps
        if diverged is None and not finished:
            raise UserError(f"{self.folder}: has no final held-out loss; remove it and run again")
        loss = held_out[-1]["loss"] if finished else math.inf
        if diverged is None and loss > LARGEST_LOSS:
            diverged = f"training diverged to a loss of {loss:g}"
        speeds = [row["tokens_per_sec"] for row in train[1:] or train]
        return {
            "loss": None if diverged else loss,
            **({"diverged": diverged} if diverged else {}),
            "curve": thinned([[row["tokens"], round(row["loss"], 5)] for row in held_out]),
            "seconds": rows[-1]["seconds"] if rows else 0.0,
            "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
            "threads": self._threads,
        }

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)


def make_room(folder: Path, run: Run, data: str | None) -> None:
    """Make sure that a folder is empty or holds the beginning of this run, on these data.

    The beginning of another run, from before the study was changed, is moved aside. What a run left
    that was killed before it wrote its settings is removed.
    """
    if not (folder / CONFIG).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        return
    if holds(folder, run, data):
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.other-{number}")).exists():
        number += 1
    folder.rename(aside)


def holds(folder: Path, run: Run, data: str | None) -> bool:
    """Whether a folder is that of a run, on data of this fingerprint (None: any)."""
    if not (folder / CONFIG).is_file():
        return False
    if settings(run_config(folder).resolved()) != settings(run.config):
        return False
    newest = checkpoint.latest(folder)
    if newest is None or data is None:
        return True
    with contextlib.suppress(UserError):  # the trainer passes over a damaged checkpoint
        return checkpoint.read_train_info(newest).data_sha256 == data
    return True


def run_toml(run: Run) -> str:
    """The settings file of a run, for --config of mlx_mla.train."""
    text, base = to_toml(run.config), preset(run.config.preset)
    # A setting that is unset has no line, and falls back to the preset's value.
    if overlay(base, parse_toml(text, "the run"), "the run") != run.config:
        raise UserError(
            f"preset {base.preset} sets something that arm {run.arm} must leave unset; use another "
            "preset under [base]"
        )
    return text


class Pool:
    """Trains what an agenda asks for, `jobs` runs at a time, with a line for every run.

    Args:
        runs: The folder of all runs.
        jobs: How many at a time; each gets its share of the cores.
        data: Fingerprint of the data.
        console: Where progress is shown.
    """

    def __init__(self, runs: Path, jobs: int, data: str | None, console: Console):
        self._runs, self._jobs, self._data, self._console = runs, jobs, data, console
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
                trainer = Trainer(run, self._runs, max(1, cores() // self._jobs), self._data)
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
                if trainer.run in plan.ready:
                    plan.ready.remove(trainer.run)
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
