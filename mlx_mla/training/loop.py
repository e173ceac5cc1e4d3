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
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Backend, Start, TrainSession
from mlx_mla.card import model_card
from mlx_mla.data.dataset import TrainingData
from mlx_mla.data.tokenizer import Tokenizer, get_tokenizer
from mlx_mla.data.windows import Batch
from mlx_mla.display import TrainDisplay
from mlx_mla.errors import UserError
from mlx_mla.evaluation.runner import PreparedTask, load, metrics, task_names
from mlx_mla.evaluation.tasks import TASKS, TaskSetup
from mlx_mla.evaluation.tasks.wikitext2 import WINDOW
from mlx_mla.files import atomic_folder, parse_toml, write_text
from mlx_mla.model.config import BackendName, DeviceName, DType
from mlx_mla.model.estimate import Estimate, check_memory, estimate, memory_advice
from mlx_mla.model.presets import overlay, to_toml
from mlx_mla.model.schedule import learning_rate
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.training import run_folder
from mlx_mla.training.log import MetricsLog, Pace
from mlx_mla.training.metrics import METRICS, plot_loss, read_metrics
from mlx_mla.training.recovery import catch_signals
from mlx_mla.training.run_folder import LATEST, PLOT
from mlx_mla.training.starting_models import (
    initial_weights_of,
    teacher,
    with_shape_of_init,
)
from mlx_mla.training.tracking import tracker_names, tracking
from mlx_mla.world import SOLO, Share, World, same_everywhere, share_of


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
        world: The ranks that train together.

    Raises:
        UserError: For any mistake in the input.
    """
    lead = world.rank == 0
    with contextlib.ExitStack() as stack:
        if lead and out.is_dir():
            stack.enter_context(run_folder.locked_run(out))
        run = _prepared(config, out, resume, world)
        config = run.config
        backend = get_backend(config.backend, config.device)
        check_memory(config, backend.fused_attention(config))
        first = _start(config, out, run.data, resume, from_step) if lead else None
        taught_by = teacher(config, run.data.tokenizer)
        start = _shared(world, first)
        # All input has been checked. From here on, the run folder is written.
        if lead and resume:
            run_folder.prepare_resume(out, config, start.step)
        elif lead:
            run_folder.create_run(out, config, stack)
        began = f"training {config.preset} into {out}"
        if resume:
            began = f"resuming {out} after step {start.step}"
        ranks = "" if world.size == 1 else f" with {world.size} ranks"
        console.print(began + ranks)
        expected = _expected_memory(config, backend, console)
        peak_flops = _peak_flops(config.backend, config.device, config.dtype) if lead else math.inf
        pace = Pace(config, expected.train_flops_per_token, peak_flops)
        stack.enter_context(backend.limited_memory(expected.total_bytes))
        session = backend.train_session(config, start, taught_by, world)
        log = None
        if lead:
            rows = read_metrics(out / METRICS)
            trackers = stack.enter_context(tracking(config, out, rows, console))
            log = MetricsLog(out, trackers, run.resume_advice)
        return _Loop(run, session, start, console, log, pace).run()


@dataclasses.dataclass(frozen=True)
class _Run:
    """The checked parts of a run on this rank."""

    config: TrainConfig
    out: Path
    data: TrainingData
    tasks: Sequence[PreparedTask]
    world: World
    share: Share

    def resume_advice(self) -> str:
        newest = checkpoint.latest(self.out)
        if newest is None:
            return "no checkpoint has been saved yet"
        remedy = f"fix the cause and add --resume --out {shlex.quote(str(self.out))}"
        return f"the newest good checkpoint is {newest}; {remedy}"


class _Loop:
    """Runs the steps of a run. `log` is None on ranks that write nothing."""

    def __init__(
        self,
        run: _Run,
        session: TrainSession,
        start: Start,
        console: Console,
        log: MetricsLog | None,
        pace: Pace,
    ):
        self.parts, self.session, self.log, self.pace = run, session, log, pace
        self.config, self.out, self.data, self.world = run.config, run.out, run.data, run.world
        self.lead = log is not None
        if self.lead:
            self.world.advice = run.resume_advice
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
        count, size = self.parts.share
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
        self.pace.step(time.perf_counter() - began)
        speed, share = self.pace.tokens_per_sec, self.pace.mfu
        self.display.step(self.done, result.loss, speed, share)
        if self.done == 1 or self.done % config.log_every == 0 or self.done == config.steps:
            self._log_loss("train", result.loss, lr, speed, mfu=round(share, 4))
            self.pace.logged()

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
        for prepared in self.parts.tasks:
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
        try:
            with atomic_folder(target) as folder:
                card = model_card(config, self.done, self.val_loss)
                checkpoint.write_model(
                    folder, config.model, self.session.weights(), self.data.fast_tokenizer, card
                )
                checkpoint.write_train_state(folder, self.session.optimizer_state(), info)
            write_text(self.out / LATEST, target.name + "\n")
        except UserError as e:
            raise UserError(f"{e}; {self.parts.resume_advice()}") from e
        self.saved = self.done
        checkpoint.prune(self.out, config.keep, self.done)
        try:
            plot_loss(self.out / METRICS, self.out / PLOT, self.out.name)
        except UserError as e:
            raise UserError(f"{e}; {self.parts.resume_advice()}") from e

    def _sample(self) -> str | None:
        """Generate a text with the current weights, and append it to samples.jsonl.

        The text depends only on the seed and the step.
        """
        config = self.config
        known = self.data.tokenizer
        prompt = known.encode(config.sample_prompt).tolist() or [known.end_of_text]
        prompt = prompt[: config.model.n_positions - 1]
        length = min(config.sample_tokens, config.model.n_positions - len(prompt))
        if length < 1:
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
        """End the run with advice on how to resume if reading the data fails."""
        try:
            yield
        except (OSError, UserError) as e:
            # Rank 0 adds its advice to another rank's error.
            advice = f"; {self.parts.resume_advice()}" if self.lead else ""
            raise UserError(f"{what} cannot be read: {e}{advice}") from e

    def _diverged(self, sign: str) -> str:
        return (
            f"training diverged at step {self.done} ({sign}) and was stopped; use a lower "
            f"--learning-rate or a larger --adam-epsilon; {self.parts.resume_advice()}"
        )


def _prepared(config: TrainConfig, out: Path, resume: bool, world: World) -> _Run:
    """Prepare the settings of all ranks, and the data and tasks of this rank.

    Raises:
        UserError: If a setting is impossible, or the data differ between ranks.
    """
    if world.rank == 0:
        tokenizer, config = _resolved(config, resume)
    if world.size > 1:
        config = overlay(
            TrainConfig(), parse_toml(world.first(to_toml(config)), "rank 0"), "rank 0"
        )
    if world.rank:
        tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
    share = share_of(world.size, config.batch_size, config.passes_per_step)
    data = TrainingData(config, tokenizer)
    same_everywhere(
        world, f"{data.fingerprint} {data.samples}", f"other tokens in --data {config.data}"
    )
    tasks = _tasks(config, data) if world.rank == 0 else []
    tracker_names(config.track)
    return _Run(config, out, data, tasks, world, share)


def _tasks(config: TrainConfig, data: TrainingData) -> list[PreparedTask]:
    """Prepare the tasks of --eval-tasks, with the samples that the whole run uses."""
    if not config.eval_tasks:
        return []
    n_positions = config.model.n_positions
    # Windows as long as the model allows: they show the run's progress, and need not be comparable
    # with published values.
    window = min(WINDOW, n_positions)
    setup = TaskSetup(data.fast_tokenizer, n_positions, window, config.eval_limit, config.seed)
    folder = None if config.eval_data_dir is None else Path(config.eval_data_dir)
    prepared = []
    for name in task_names(config.eval_tasks, "--eval-tasks"):
        documents = load(TASKS[name], "standard", folder, config.eval_limit, config.seed)
        prepared.append(PreparedTask(TASKS[name], documents, "standard", setup))
    return prepared


def _resolved(config: TrainConfig, resume: bool) -> tuple[Tokenizer, TrainConfig]:
    """Return the tokenizer, and the settings with all defaults filled in."""
    tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
    if config.init is not None and not resume:
        config = with_shape_of_init(config, tokenizer)
    return tokenizer, config.resolved(tokenizer.size)


def _start(
    config: TrainConfig, out: Path, data: TrainingData, resume: bool, from_step: int | None
) -> Start:
    """Return the checkpoint to resume from, or the initial weights."""
    point = run_folder.resume_point(config, out, from_step, data) if resume else None
    return Start(initial_weights_of(config)) if point is None else point


def _shared(world: World, start: Start | None) -> Start:
    """Share rank 0's start with every rank."""
    point = world.first(
        None if start is None else [start.step, start.val_loss, start.optimizer_state is not None]
    )
    step, val_loss, has_state = point
    weights = world.broadcast(None if start is None else start.weights)
    state = None if start is None else start.optimizer_state
    return Start(weights, step, world.broadcast(state) if has_state else None, val_loss)


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
