"""The training loop: batches in, metrics and checkpoints out. It knows no framework.

Everything a step depends on is a function of the configuration, the data and the step number, or is
in the checkpoint; so a run that was stopped and resumed is bit-identical to one that was not.
"""

import dataclasses
import itertools
import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_mla import checkpoint, corpus
from mlx_mla.backend import Teacher, TrainSession, get_backend
from mlx_mla.card import model_card
from mlx_mla.config import ModelConfig, TrainConfig, flag, overlay, parse_toml, read_toml, to_toml
from mlx_mla.display import TrainDisplay
from mlx_mla.errors import UserError
from mlx_mla.evaluator import PreparedTask, context_of, load, metrics, task_names
from mlx_mla.plot import plot_loss, read_metrics
from mlx_mla.recovery import catch_signals
from mlx_mla.shards import Batch, TokenWindows
from mlx_mla.tasks import TASKS
from mlx_mla.tasks.wikitext2 import WINDOW
from mlx_mla.tokenizer import TextEncoder, get_encoder
from mlx_mla.weights import initial_weights
from mlx_mla.world import SOLO, World, passes, same_everywhere

import numpy as np
from rich.console import Console

CONFIG, METRICS, PLOT, LATEST = "config.toml", "metrics.jsonl", "loss.png", "latest"

# Beside the shape of the model, these decide which batch a step sees, where the run began or what it minimises.
FIXED_ON_RESUME = (
    "tokenizer", "val_fraction", "batch_size", "grad_accum_steps", "seq_len", "seed", "init", "initializer_range",
    "teacher", "teacher_weight", "teacher_temperature",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a call of `train` ended."""

    checkpoint: Path
    """The newest checkpoint."""
    step: int
    val_loss: float | None
    """Validation loss over the whole held-out text; None if the run was interrupted."""
    sample: str | None
    """Text generated at the end."""
    signal: int | None
    """The signal that interrupted the run, else None."""


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the step that follows `step` finished ones: linear warm-up, then cosine decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


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
        config: Settings; defaults in it are filled in here. Those of rank 0 hold for all.
        out: The run folder: a new one, or with `resume` one that holds a run. Only rank 0 reads and writes it.
        resume: Go on from the newest checkpoint of `out`.
        from_step: With `resume`, go on from the checkpoint of this step instead.
        console: Where progress is shown.
        world: The ranks that train together.

    Raises:
        UserError: For anything the user can set right; see the message.
    """
    lead = world.rank == 0
    if lead:
        encoder = get_encoder(config.tokenizer, config.bpe_dir)
        if config.init is not None and not resume:
            config = _with_model_of(config, checkpoint.model_folder(Path(config.init)), encoder)
        config = config.resolved(encoder.size)
    if world.size > 1:
        config = overlay(TrainConfig(), parse_toml(world.first(to_toml(config)), "rank 0"), "rank 0")
    if not lead:
        encoder = get_encoder(config.tokenizer, config.bpe_dir)
    share = passes(world.size, config.batch_size, config.grad_accum_steps)
    tokens = corpus.tokenize(corpus.read_documents(config.data), encoder)
    data = _Data(config, encoder, tokens)
    same_everywhere(world, data.fingerprint, f"other tokens in --data {config.data}")
    tasks = _tasks(config, data) if lead else []
    start = _resume_point(config, out, from_step, data) if lead and resume else None
    weights = None if not lead else _first_weights(config) if start is None else start.weights
    teacher = _teacher(config, encoder)
    backend = get_backend(config.backend, config.device)
    start, weights = _share(world, start, weights)
    done = 0 if start is None else start.step
    # All that the user may have got wrong is checked; from here on the run folder is written.
    if lead and resume:
        checkpoint.write_text(out / CONFIG, to_toml(config))
        _keep_metrics_until(out / METRICS, done)
    elif lead:
        _claim(out, config)
    began = f"resuming {out} after step {done}" if resume else f"training {config.preset} into {out}"
    console.print(began if world.size == 1 else f"{began} with {world.size} ranks", highlight=False, soft_wrap=True)
    optimizer_state = None if start is None else start.optimizer_state
    session = backend.train_session(config, weights, optimizer_state, done, teacher, world)
    return _Loop(config, out, data, tasks, session, console, start, world, share).run()


class _Data:
    """Training and held-out windows of one token array."""

    def __init__(self, config: TrainConfig, encoder: TextEncoder, tokens: np.ndarray):
        assert config.model.vocab_size
        self.encoder = encoder
        self.tokenizer = encoder.fast_tokenizer()
        self.fingerprint = corpus.fingerprint(tokens)
        cut = int(len(tokens) * (1 - config.val_fraction))
        T, vocab = config.context, config.model.vocab_size
        self.train = TokenWindows(tokens[:cut], T, config.seed, vocab, "the training part of --data")
        self.val = TokenWindows(tokens[cut:], T, config.seed, vocab, "the held-out part of --data")


@dataclasses.dataclass(frozen=True)
class _ResumePoint:
    step: int
    val_loss: float | None
    weights: dict[str, np.ndarray]
    optimizer_state: dict[str, np.ndarray]


class _Loop:
    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        data: _Data,
        tasks: Sequence[PreparedTask],
        session: TrainSession,
        console: Console,
        start: _ResumePoint | None,
        world: World,
        share: tuple[int, int],
    ):
        self.config, self.out, self.data, self.session = config, out, data, session
        self.world, self.share, self.lead = world, share, world.rank == 0
        if self.lead:
            world.advice = self._go_on
        self.tasks, self.tokenizer = tasks, data.tokenizer
        self.done = self.saved = 0 if start is None else start.step
        self.val_loss = None if start is None else start.val_loss
        self.display = TrainDisplay(console, self.done, config.steps)
        # Time spent training, without validation and saving, since the last logged step.
        self._clock, self._clock_tokens = 0.0, 0
        self._spent, self._spent_steps, self._timed = 0.0, 0, False

    def run(self) -> RunResult:
        config = self.config
        if self.lead:
            (self.out / "checkpoints").mkdir(exist_ok=True)
        stopped: int | None = None
        with self.display, catch_signals(second_acts=self.world.size == 1) as caught:
            while self.done < config.steps:
                batches, stopped = self._next(caught)
                if stopped is not None:
                    break
                self._step(batches)
                finished = self.done == config.steps
                if finished or _due(self.done, config.eval_every):
                    self._validate(everything=finished)
                    self._run_tasks()
                if finished or _due(self.done, config.save_every):
                    self._save()
            if self.saved != self.done:
                self._save()
        newest = checkpoint.checkpoint_path(self.out, self.saved)
        if stopped is not None:
            return RunResult(newest, self.done, None, None, stopped)
        return RunResult(newest, self.done, self.val_loss, self._sample() if self.lead else None, None)

    def _next(self, caught: Sequence[int]) -> tuple[list[Batch], int | None]:
        """This rank's batches of the next step, and the signal that stops the run before it, if any rank got one."""
        count, size = self.share
        first = (self.done * self.world.size + self.world.rank) * count * size
        try:
            batches = [self.data.train.rows(first + i * size, size) for i in range(count)]
        except (OSError, UserError) as e:
            advice = f"; {self._go_on()}" if self.lead else ""  # rank 0 adds its own to another's error
            raise UserError(f"the batches of step {self.done + 1} cannot be read: {e}{advice}") from e
        orphaned = signal.SIGTERM if self.world.launcher_has_gone() else None
        signals = self.world.gather(caught[0] if caught else orphaned)
        return batches, next((s for s in signals if s is not None), None)

    def _step(self, batches: Sequence[Batch]) -> None:
        config, began = self.config, time.perf_counter()
        lr = learning_rate(config, self.done)
        result = self.session.step(self.done, lr, batches)
        result = dataclasses.replace(result, loss=sum(self.world.gather(result.loss)) / self.world.size)
        self.done += 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise UserError(self._diverged(result.loss, result.grad_norm))
        elapsed = time.perf_counter() - began
        self._clock += elapsed
        self._clock_tokens += config.tokens_per_step
        if self._timed:  # the first step compiles, which says nothing about those to come
            self._spent += elapsed
            self._spent_steps += 1
        self._timed = True
        speed = self._clock_tokens / self._clock
        left = config.steps - self.done
        eta = left * self._spent / self._spent_steps if self._spent_steps else None
        self.display.step(self.done, result.loss, speed, eta)
        if self.done == 1 or self.done % config.log_every == 0 or self.done == config.steps:
            self._log_loss("train", result.loss, lr, speed)
            self._clock, self._clock_tokens = 0.0, 0

    def _validate(self, everything: bool) -> None:
        began, total, count = time.perf_counter(), 0.0, 0
        batches = self.data.val.sequential(self.config.batch_size, 0 if everything else self.config.eval_batches)
        for batch in itertools.islice(batches, self.world.rank, None, self.world.size):
            total += self.session.loss_sum(batch)
            count += batch[1].size
        total, count = map(sum, zip(*self.world.gather([total, count]), strict=True))
        self.val_loss = total / count
        self.display.validation(self.done, self.val_loss)
        rate = learning_rate(self.config, self.done - 1)
        self._log_loss("val", self.val_loss, rate, count / (time.perf_counter() - began))

    def _run_tasks(self) -> None:
        """Run the tasks on rank 0, while the others wait."""
        scorer = self.session.scorer(self.tokenizer)
        for prepared in self.tasks:
            row = metrics(prepared.run(scorer, self.config.batch_size))
            self._log(prepared.task.name, row)
            self.display.task(self.done, prepared.task.name, row)

    def _log_loss(self, split: str, loss: float, lr: float, tokens_per_sec: float) -> None:
        rest = {"tokens_per_sec": round(tokens_per_sec, 1), "peak_memory_bytes": self.session.peak_memory_bytes()}
        self._log(split, {"loss": loss, "lr": lr, "tokens": self.done * self.config.tokens_per_step, **rest})

    def _log(self, split: str, values: dict[str, Any]) -> None:
        if not self.lead:
            return
        row = {"step": self.done, "split": split, **values}
        try:
            with (self.out / METRICS).open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UserError(f"{self.out / METRICS}: could not be written: {e.strerror}; {self._go_on()}") from e

    def _save(self) -> None:
        if not self.lead:
            self.saved = self.done
            return
        config, target = self.config, checkpoint.checkpoint_path(self.out, self.done)
        info = {
            "format": 1,
            "step": self.done,
            "tokens": self.done * config.tokens_per_step,
            "val_loss": self.val_loss,
            "optimizer": "adamw",
            "data_sha256": self.data.fingerprint,
        }
        try:
            with checkpoint.atomic_folder(target) as folder:
                card = model_card(config, self.done, self.val_loss)
                checkpoint.write_model(folder, config.model, self.session.weights(), self.tokenizer, card)
                checkpoint.write_train_state(folder, self.session.optimizer_state(), info)
            checkpoint.write_text(self.out / LATEST, target.name + "\n")
        except UserError as e:
            raise UserError(f"{e}; {self._go_on()}") from e
        self.saved = self.done
        checkpoint.prune(self.out, config.keep, self.done)
        try:
            plot_loss(self.out / METRICS, self.out / PLOT, f"{self.out.name} ({config.preset})")
        except OSError as e:
            raise UserError(f"{self.out / PLOT}: could not be written: {e.strerror or e}; {self._go_on()}") from e

    def _sample(self) -> str | None:
        config = self.config
        prompt = self.data.encoder.encode(config.sample_prompt).tolist() or [self.data.encoder.end_of_text]
        prompt = prompt[: config.model.n_positions - 1]
        length = min(config.sample_tokens, config.model.n_positions - len(prompt))
        if length < 1:
            return None
        tokens = self.session.generate(prompt, length, temp=0.8, seed=config.seed)
        return self.tokenizer.decode(prompt + [t for t in tokens if t < self.data.encoder.end_of_text])

    def _go_on(self) -> str:
        newest = checkpoint.latest(self.out)
        if newest is None:
            return "no checkpoint was saved before"
        return f"the newest good checkpoint is {newest}; set things right and add --resume --out {self.out}"

    def _diverged(self, loss: float, norm: float) -> str:
        return (
            f"training diverged at step {self.done} (loss {loss}, gradient norm {norm}) and was stopped; "
            f"{self._go_on()} with a lower --learning-rate"
        )


def _tasks(config: TrainConfig, data: _Data) -> list[PreparedTask]:
    """The tasks of --eval-tasks, on the samples that the whole run uses."""
    if not config.eval_tasks:
        return []
    n_positions = config.model.n_positions
    # Windows as long as the model allows: its progress is wanted here, not a figure to set beside others.
    window = min(WINDOW, n_positions)
    context = context_of(data.tokenizer, n_positions, window, config.eval_limit, config.seed)
    folder = None if config.eval_data_dir is None else Path(config.eval_data_dir)
    prepared = []
    for name in task_names(config.eval_tasks, "--eval-tasks"):
        documents = load(TASKS[name], "standard", folder, config.eval_limit, config.seed)
        prepared.append(PreparedTask(TASKS[name], documents, "standard", context))
    return prepared


def _share(
    world: World, start: _ResumePoint | None, weights: dict[str, np.ndarray] | None
) -> tuple[_ResumePoint | None, dict[str, np.ndarray]]:
    """Rank 0's first weights, and the checkpoint it resumes from, on every rank."""
    point = world.first(None if start is None else [start.step, start.val_loss])
    weights = world.broadcast(weights)
    if point is None:
        return None, weights
    step, val_loss = point
    state = world.broadcast(None if start is None else start.optimizer_state)
    return _ResumePoint(step, val_loss, weights, state), weights


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _first_weights(config: TrainConfig) -> dict[str, np.ndarray]:
    if config.init is None:
        return initial_weights(config.model, config.seed, config.initializer_range)
    return _whole_weights("--init", checkpoint.model_folder(Path(config.init)), config.model)


def _teacher(config: TrainConfig, encoder: TextEncoder) -> Teacher | None:
    """The model of --teacher; UserError if it cannot teach this one."""
    if config.teacher is None:
        return None
    folder = checkpoint.model_folder(Path(config.teacher))
    shape = checkpoint.read_config(folder)
    _check_tokenizer("--teacher", folder, encoder)
    if shape.n_positions < config.context:
        raise UserError(
            f"--teacher {folder}: has {shape.n_positions} positions, a sequence {config.context} tokens; "
            f"use --seq-len {shape.n_positions}, or another teacher"
        )
    assert shape.vocab_size
    if shape.vocab_size < encoder.size:
        raise UserError(
            f"--teacher {folder}: has {shape.vocab_size} rows of vocabulary for {encoder.size} ids; "
            "the folder is damaged"
        )
    return Teacher(shape, _whole_weights("--teacher", folder, shape), encoder.size)


def _whole_weights(option: str, folder: Path, shape: ModelConfig) -> dict[str, np.ndarray]:
    if problem := checkpoint.damage(folder, training=False):
        raise UserError(f"{option} {folder}: {problem}; the folder is damaged")
    return checkpoint.read_weights(folder, shape)


def _with_model_of(config: TrainConfig, folder: Path, encoder: TextEncoder) -> TrainConfig:
    """Take the model's shape from a folder; dropout is not part of it and stays."""
    shape = checkpoint.read_config(folder)
    _check_tokenizer("--init", folder, encoder)
    return dataclasses.replace(config, model=dataclasses.replace(shape, dropout=config.model.dropout))


def _check_tokenizer(option: str, folder: Path, encoder: TextEncoder) -> None:
    ids = len(checkpoint.read_tokenizer(folder))
    if ids != encoder.size:
        fitting = {257: "bytes", 50257: "gpt2"}.get(ids)
        advice = f"use --tokenizer {fitting}" if fitting else "no --tokenizer of this project fits it"
        raise UserError(
            f"{option} {folder}: its tokenizer has {ids} ids, --tokenizer {encoder.name} has {encoder.size}; {advice}"
        )


def _claim(out: Path, config: TrainConfig) -> None:
    """Make the run folder, unless something is there that must not be overwritten."""
    if (out / CONFIG).exists():
        raise UserError(f"{out}: holds another run; add --resume to go on with it, or give --out a new name")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not an empty folder; give --out a new name")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be made: {e.strerror}; give --out another place") from e
    checkpoint.write_text(out / CONFIG, to_toml(config))


def run_config(out: Path) -> TrainConfig:
    """The settings that a run folder was made with."""
    if not (out / CONFIG).is_file():
        raise UserError(f"{out}: holds no run to resume (no {CONFIG}); leave out --resume to start one")
    return overlay(TrainConfig(), read_toml(out / CONFIG), str(out / CONFIG))


def _resume_point(config: TrainConfig, out: Path, from_step: int | None, data: _Data) -> _ResumePoint | None:
    before = run_config(out)
    for where, old, new, names in (
        ("model", before.model, config.model, [f.name for f in dataclasses.fields(ModelConfig)]),
        ("run", before, config, list(FIXED_ON_RESUME)),
    ):
        for name in names:
            if getattr(old, name) != getattr(new, name):
                raise UserError(
                    f"--resume: {flag(name)} is {getattr(old, name)} in {out} and cannot become "
                    f"{getattr(new, name)}; leave it out, or start a new {where} with another --out"
                )
    folder = checkpoint.latest(out) if from_step is None else checkpoint.checkpoint_path(out, from_step)
    if folder is None:
        return None  # stopped before its first checkpoint: start over, in the same folder
    if not folder.is_dir():
        steps = ", ".join(str(checkpoint.step_of(p)) for p in checkpoint.checkpoints(out))
        raise UserError(f"--from-step {from_step}: {out} has checkpoints of steps {steps}")
    if problem := checkpoint.damage(folder):
        older = [s for p in checkpoint.checkpoints(out) if (s := checkpoint.step_of(p)) < checkpoint.step_of(folder)]
        advice = f"go on from the one before with --from-step {older[-1]}" if older else "there is no older one"
        raise UserError(f"{folder}: damaged, {problem}; {advice}")
    optimizer_state, info = checkpoint.read_train_state(folder)
    if info.get("data_sha256") != data.fingerprint:
        raise UserError(
            f"--resume: {config.data} is not the text that {out} was trained on (its sha256 differs); "
            "restore the file, or start a new run with --init"
        )
    if info["step"] >= config.steps:
        raise UserError(
            f"{out}: has finished its {info['step']} steps; give a larger --steps to go on, "
            f"or generate from it with --model {out}"
        )
    return _ResumePoint(info["step"], info["val_loss"], checkpoint.read_weights(folder, config.model), optimizer_state)


def _keep_metrics_until(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after its last checkpoint; they will be written again."""
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
