"""The training loop: batches in, metrics and checkpoints out. It imports no framework.

Everything that a step depends on is either in the checkpoint or a function of the configuration,
the data and the step number. A run that was stopped and resumed is therefore bit-identical to an
uninterrupted one.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Backend, Start, TrainSession
from mlx_mla.backends.peak import mfu
from mlx_mla.card import model_card
from mlx_mla.data.windows import Batch
from mlx_mla.display import TrainDisplay
from mlx_mla.errors import UserError
from mlx_mla.evaluation.runner import metrics
from mlx_mla.files import atomic_folder, write_text
from mlx_mla.model.config import BackendName, DeviceName, DType
from mlx_mla.model.estimate import (
    Estimate,
    check_memory,
    estimate,
    memory_advice,
    teacher_bytes,
)
from mlx_mla.model.schedule import learning_rate
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.training import run_folder
from mlx_mla.training.log import MetricsLog
from mlx_mla.training.metrics import METRICS, plot_loss, read_metrics
from mlx_mla.training.recovery import catch_signals
from mlx_mla.training.run_folder import LATEST, PLOT
from mlx_mla.training.setup import Run, prepare_run, shared_start
from mlx_mla.training.starting_models import initial_weights_of, teacher
from mlx_mla.training.tracking import tracking
from mlx_mla.world import SOLO, AgreedError, World


@dataclasses.dataclass(frozen=True)
class RunResult:
    """Outcome of a call of `train`."""

    checkpoint: Path
    """The newest checkpoint."""
    step: int
    val_loss: float | None
    """The final validation loss, over --final-eval-batches batches; None if the run was
    interrupted."""
    sample: str | None
    """Text generated at the end."""
    signal: int | None
    """The signal that interrupted the run, else None."""


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    from_step: int | None = None,
    console: Console,
    world: World = SOLO,
) -> RunResult:
    """Train a model into a run folder.

    Args:
        config: The settings, whose defaults are filled in here. All ranks use those of rank 0.
        out: The run folder: a new one, or with `resume` one that holds a run. Only rank 0 reads and
            writes it.
        resume: Resume from the newest checkpoint of `out`.
        from_step: With `resume`, resume from the checkpoint of this step instead.
        console: A `plain_console`, for progress.

    Raises:
        UserError: For any mistake in the input.
    """
    lead = world.rank == 0
    with contextlib.ExitStack() as stack:
        if lead and out.is_dir():
            stack.enter_context(run_folder.locked_run(out))
        run = prepare_run(config, resume, world)
        config = run.config
        backend = get_backend(config.backend, config.device)
        check_memory(config, backend.fused_attention(config))
        start = None
        if lead and resume:
            start = run_folder.resume_point(config, out, from_step, run.data)
        if lead and start is None:
            start = Start(initial_weights_of(config))
        taught_by = teacher(config, run.data.tokenizer)
        start = shared_start(world, start)
        # All input has been checked. From here on, the run folder is written.
        if lead and resume:
            run_folder.prepare_resume(out, config, start.step)
        elif lead:
            run_folder.create_run(out, config, stack)
        began = f"training {config.name} into {out}"
        if resume:
            began = f"resuming {out} after step {start.step}"
        ranks = "" if world.size == 1 else f" with {world.size} ranks"
        console.print(began + ranks)
        expected = _expected_memory(config, backend, console)
        peak_flops = _peak_flops(config.backend, config.device, config.dtype) if lead else math.inf
        taught = 0 if taught_by is None else teacher_bytes(config, taught_by.config)
        stack.enter_context(backend.limited_memory(expected.total_bytes + taught))
        session = backend.train_session(config, start, taught_by, world)
        log = None
        if lead:
            rows = read_metrics(out / METRICS)
            trackers = stack.enter_context(tracking(config, out, rows, console))
            log = MetricsLog(out, trackers)
            world.advice = partial(run_folder.resume_advice, out)
        flops = expected.train_flops_per_token
        loop = _Loop(
            run, out, session, start, console, log, lambda speed: mfu(flops, speed, peak_flops)
        )
        try:
            return loop.run()
        except AgreedError:  # has the advice already
            raise
        except UserError as e:
            raise UserError(f"{e}; {world.advice()}" if world.advice else str(e)) from e


class _Loop:
    """Runs the steps of a run. `log` is None on ranks that write nothing."""

    def __init__(
        self,
        run: Run,
        out: Path,
        session: TrainSession,
        start: Start,
        console: Console,
        log: MetricsLog | None,
        mfu_at: Callable[[float], float],
    ):
        self.session, self.log, self.mfu_at, self.out = session, log, mfu_at, out
        self.paced, self.seconds = 0, 0.0  # steps since the last logged one, and their time
        self.config, self.data, self.world = run.config, run.data, run.world
        self.tasks, self.share = run.tasks, run.share
        self.lead = log is not None
        self.done = self.saved = start.step
        self.val_loss = start.val_loss
        self.display = TrainDisplay(console, self.done, self.config.steps)

    def run(self) -> RunResult:
        config, sample = self.config, None
        stopped: int | None = None
        with self.display, catch_signals(second_acts=self.world.size == 1) as caught:
            while self.done < config.steps:
                batches, stopped = self._next(caught)
                if stopped is not None:
                    break
                self._step(batches)
                finished = self.done == config.steps
                self._check_finite(finished)
                if finished or _due(self.done, config.eval_every):
                    self._validate(config.final_eval_batches if finished else config.eval_batches)
                    self._run_tasks()
                if self.lead and (finished or _due(self.done, config.sample_every)):
                    sample = self._sample()
                    if sample is not None and not finished:  # the caller shows the last one
                        self.display.sample(self.done, sample)
                if finished or _due(self.done, config.save_every):
                    self._save()
            if self.saved != self.done:
                self._check_finite(True)
                self._save()
        newest = checkpoint.checkpoint_path(self.out, self.saved)
        if stopped is not None:
            return RunResult(newest, self.done, None, None, stopped)
        return RunResult(newest, self.done, self.val_loss, sample, None)

    def _next(self, caught: Sequence[int]) -> tuple[list[Batch], int | None]:
        """Return this rank's batches of the next step, and the signal that stops the run before
        that step, if any rank received one."""
        count, size = self.share
        first = (self.done * self.world.size + self.world.rank) * count * size
        with self._reading(f"the batches of step {self.done + 1}"):
            batches = [self.data.train.rows(first + i * size, size) for i in range(count)]
        orphaned = signal.SIGTERM if self.world.launcher_has_gone() else None
        signals = self.world.gather(caught[0] if caught else orphaned)
        return batches, next((s for s in signals if s is not None), None)

    def _step(self, batches: Sequence[Batch]) -> None:
        config, began = self.config, time.perf_counter()
        lr = learning_rate(config, self.done)
        result = self.session.step(self.done, lr, batches)
        result = dataclasses.replace(
            result, loss=sum(self.world.gather(result.loss)) / self.world.size
        )
        self.done += 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise UserError(self._diverged(f"loss {result.loss}, gradient norm {result.grad_norm}"))
        self.paced, self.seconds = self.paced + 1, self.seconds + time.perf_counter() - began
        speed = self.paced * config.step_tokens / self.seconds
        share = self.mfu_at(speed)
        self.display.step(self.done, result.loss, speed, share)
        if self.done == 1 or self.done % config.log_every == 0 or self.done == config.steps:
            self._log_loss("train", result.loss, lr, speed, mfu=round(share, 4))
            self.paced, self.seconds = 0, 0.0

    def _check_finite(self, finished: bool) -> None:
        """End the run if the weights are not finite, before they are used.

        The loss of a step does not show this, since it is computed before the update.
        """
        config = self.config
        due = (config.eval_every, config.sample_every, config.save_every)
        used = finished or any(_due(self.done, every) for every in due)
        if used and not self.session.is_finite():
            raise UserError(self._diverged("weights that are not finite"))

    def _validate(self, max_batches: int) -> None:
        began, total, count = time.perf_counter(), 0.0, 0
        every = self.data.val.sequential(self.config.batch_size, max_batches)
        batches = itertools.islice(every, self.world.rank, None, self.world.size)
        while True:
            with self._reading("the held-out text"):
                batch = next(batches, None)
            if batch is None:
                break
            total += self.session.loss_sum(batch)
            count += batch[1].size
        total, count = map(sum, zip(*self.world.gather([total, count]), strict=True))
        if not math.isfinite(total):
            raise UserError(self._diverged(f"validation loss {total / count}"))
        self.val_loss = total / count
        self.display.validation(self.done, self.val_loss)
        rate = learning_rate(self.config, self.done - 1)
        self._log_loss("val", self.val_loss, rate, count / (time.perf_counter() - began))

    def _run_tasks(self) -> None:
        """Run the tasks on rank 0, while the other ranks wait."""
        scorer = self.session.scorer(self.data.fast_tokenizer)
        for prepared in self.tasks:
            row = metrics(prepared.run(scorer, self.config.batch_size))
            self._log(prepared.task.name, row)
            self.display.task(self.done, prepared.task.name, row)

    def _log_loss(
        self, split: str, loss: float, lr: float, tokens_per_sec: float, **more: float
    ) -> None:
        rest = {
            "tokens_per_sec": round(tokens_per_sec, 1),
            "peak_memory_bytes": self.session.peak_memory_bytes(),
        }
        self._log(
            split,
            {"loss": loss, "lr": lr, "tokens": self.done * self.config.step_tokens, **rest, **more},
        )

    def _log(self, split: str, values: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.add(self.done, split, values)

    def _save(self) -> None:
        if not self.lead:
            self.saved = self.done
            return
        config, target = self.config, checkpoint.checkpoint_path(self.out, self.done)
        info = {
            "format": checkpoint.STATE_FORMAT,
            "step": self.done,
            "tokens": self.done * config.step_tokens,
            "val_loss": self.val_loss,
            "optimizer": config.optimizer,
            "data_sha256": self.data.fingerprint,
            "data_samples_sha256": self.data.samples,
        }
        with atomic_folder(target) as folder:
            card = model_card(config, self.done, self.val_loss)
            checkpoint.write_model(
                folder, config.model, self.session.weights(), self.data.fast_tokenizer, card
            )
            checkpoint.write_train_state(folder, self.session.optimizer_state(), info)
        write_text(self.out / LATEST, target.name + "\n")
        self.saved = self.done
        checkpoint.prune(self.out, config.keep, self.done)
        plot_loss(self.out / METRICS, self.out / PLOT, self.out.name)

    def _sample(self) -> str | None:
        """Generate a text with the current weights, and append it to samples.jsonl.

        The text depends only on the seed and the step.
        """
        config = self.config
        known = self.data.tokenizer
        prompt = known.encode(config.sample_prompt).tolist() or [known.end_of_text]
        prompt = prompt[: config.model.n_positions - 1]
        length = min(config.sample_tokens, config.model.n_positions - len(prompt))
        if not prompt or length < 1:
            return None
        tokens = self.session.generate(prompt, length, temp=0.8, seed=config.seed)
        text = self.data.fast_tokenizer.decode(
            prompt + [t for t in tokens if t < known.size and t != known.end_of_text]
        )
        if self.log is not None:
            self.log.sample(self.done, text)
        return text

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """End the run with a UserError if reading the data fails."""
        try:
            yield
        except (OSError, UserError) as e:
            raise UserError(f"{what} cannot be read: {e}") from e

    def _diverged(self, sign: str) -> str:
        return (
            f"training diverged at step {self.done} ({sign}) and was stopped; use a lower "
            "--learning-rate or a larger --adam-epsilon"
        )


def _expected_memory(config: TrainConfig, backend: Backend, console: Console) -> Estimate:
    """Estimate the memory of a step, and warn if the device has less."""
    fused, limit = backend.fused_attention(config), backend.memory_bytes()
    expected = estimate(config, fused)
    if (advice := memory_advice(config, fused, limit)) is not None:
        console.print(
            f"warning: a step needs about {expected.total_bytes / 2**30:.1f} GiB, but the device "
            f"has {limit / 2**30:.1f}: training will swap (many times slower) or fail; to fit: "
            f"{advice}"
        )
    return expected


@functools.cache
def _peak_flops(backend: BackendName, device: DeviceName, dtype: DType) -> float:
    """The device's measured peak, for the MFU. Measured once per process."""
    return get_backend(backend, device).peak_flops(dtype)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
