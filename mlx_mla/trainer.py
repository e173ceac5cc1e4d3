"""The training loop: batches in, metrics and checkpoints out. It knows no framework.

Everything a step depends on is a function of the configuration, the data and the step number, or is
in the checkpoint; so a run that was stopped and resumed is bit-identical to one that was not.
"""

import contextlib
import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_mla import checkpoint, corpus
from mlx_mla.backend import BackendName, DeviceName, DType, Teacher, TrainSession, get_backend
from mlx_mla.card import model_card
from mlx_mla.config import ModelConfig, TrainConfig, flag, overlay, read_toml, to_toml
from mlx_mla.display import TrainDisplay
from mlx_mla.errors import UserError
from mlx_mla.estimate import estimate
from mlx_mla.evaluator import PreparedTask, context_of, load, metrics, task_names
from mlx_mla.peak import mfu
from mlx_mla.plot import plot_loss, read_metrics
from mlx_mla.shards import TokenWindows
from mlx_mla.tasks import TASKS
from mlx_mla.tasks.wikitext2 import WINDOW
from mlx_mla.token_files import Shard, open_folder
from mlx_mla.tokenizer import TextEncoder, get_encoder
from mlx_mla.tracking import Tracking, tracker_names, tracking
from mlx_mla.weights import initial_weights

import numpy as np
from rich.console import Console

CONFIG, METRICS, SAMPLES, PLOT, LATEST = "config.toml", "metrics.jsonl", "samples.jsonl", "loss.png", "latest"

# Beside the shape of the model, these decide which batch a step sees, where the run began or what it minimises.
FIXED_ON_RESUME = (
    "tokenizer", "val_fraction", "batch_size", "grad_accum_steps", "seq_len", "seed", "init", "initializer_range",
    "optimizer", "teacher", "teacher_weight", "teacher_temperature",
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
    """Learning rate of the step that follows `step` finished ones: linear warm-up, then --lr-schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "wsd":
        # Warm-up, stable, decay (MiniCPM, arXiv:2404.06395), with the linear decay of arXiv:2405.18392.
        decay = max(1, round((config.decay_fraction or 0) * config.steps))
        left = min(1.0, max(0, config.steps - step) / decay)
    else:
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def train(
    config: TrainConfig, out: Path, *, resume: bool = False, from_step: int | None = None, console: Console
) -> RunResult:
    """Train a model into a run folder.

    Args:
        config: Settings; defaults in it are filled in here.
        out: The run folder: a new one, or with `resume` one that holds a run.
        resume: Go on from the newest checkpoint of `out`.
        from_step: With `resume`, go on from the checkpoint of this step instead.
        console: Where progress is shown.

    Raises:
        UserError: For anything the user can set right; see the message.
    """
    encoder = get_encoder(config.tokenizer, config.bpe_dir)
    if config.init is not None and not resume:
        config = _with_model_of(config, checkpoint.model_folder(Path(config.init)), encoder)
    config = config.resolved(encoder.size)
    data = _Data(config, encoder)
    tasks = _tasks(config, data)
    tracker_names(config.track)
    start = _resume_point(config, out, from_step, data) if resume else None
    weights = _first_weights(config) if start is None else start.weights
    teacher = _teacher(config, encoder)
    backend = get_backend(config.backend, config.device)
    done = 0 if start is None else start.step
    # All that the user may have got wrong is checked; from here on the run folder is written.
    if resume:
        checkpoint.write_text(out / CONFIG, to_toml(config))
        for name in (METRICS, SAMPLES):
            _keep_rows_until(out / name, done)
    else:
        _claim(out, config)
    console.print(
        f"resuming {out} after step {done}" if resume else f"training {config.preset} into {out}", highlight=False
    )
    peak_flops = _peak_flops(config.backend, config.device, config.dtype)
    optimizer_state = None if start is None else start.optimizer_state
    session = backend.train_session(config, weights, optimizer_state, done, teacher)
    with tracking(config, out, read_metrics(out / METRICS), console) as trackers:
        return _Loop(config, out, data, tasks, session, console, start, trackers, peak_flops).run()


class _Data:
    """Training and held-out windows of --data: a text, or a folder of token shards."""

    def __init__(self, config: TrainConfig, encoder: TextEncoder):
        assert config.model.vocab_size
        self.encoder = encoder
        self.tokenizer = encoder.fast_tokenizer()
        train: np.ndarray | list[Shard]
        val: np.ndarray | list[Shard]
        if Path(config.data).is_dir():
            folder = open_folder(Path(config.data))
            folder.check_tokenizer(encoder.name)
            self.fingerprint = folder.fingerprint
            train, val = folder.held_out(config.val_fraction)
        else:
            tokens = corpus.tokenize(corpus.read_documents(config.data), encoder)
            self.fingerprint = corpus.fingerprint(tokens)
            cut = int(len(tokens) * (1 - config.val_fraction))
            train, val = tokens[:cut], tokens[cut:]
        T, vocab = config.context, config.model.vocab_size
        self.train = TokenWindows(train, T, config.seed, vocab, "the training part of --data")
        self.val = TokenWindows(val, T, config.seed, vocab, "the held-out part of --data")


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
        trackers: Tracking,
        peak_flops: float,
    ):
        self.config, self.out, self.data, self.session = config, out, data, session
        self.tasks, self.tokenizer = tasks, data.tokenizer
        self.done = self.saved = 0 if start is None else start.step
        self.val_loss = None if start is None else start.val_loss
        self.display = TrainDisplay(console, self.done, config.steps)
        self.trackers, self.peak_flops = trackers, peak_flops
        self.flops_per_token = estimate(config, fused_attention=True).train_flops_per_token
        # When the run would have begun, had it never stopped.
        so_far = max((row.get("seconds", 0.0) for row in read_metrics(out / METRICS)), default=0.0)
        self._began = time.perf_counter() - so_far
        # Time spent training, without validation and saving, since the last logged step.
        self._clock, self._clock_tokens = 0.0, 0
        self._spent, self._spent_steps, self._timed = 0.0, 0, False

    def run(self) -> RunResult:
        config, sample = self.config, None
        (self.out / "checkpoints").mkdir(exist_ok=True)
        with self.display, _catch_signals() as caught:
            while self.done < config.steps and not caught:
                self._step()
                finished = self.done == config.steps
                if finished or _due(self.done, config.eval_every):
                    self._validate(everything=finished)
                    self._run_tasks()
                if finished or _due(self.done, config.sample_every):
                    sample = self._sample()
                    if sample is not None and not finished:  # the last one is the caller's to show
                        self.display.sample(self.done, sample)
                if finished or _due(self.done, config.save_every):
                    self._save()
            if self.saved != self.done:
                self._save()
        newest = checkpoint.checkpoint_path(self.out, self.saved)
        if caught:
            return RunResult(newest, self.done, None, None, caught[0])
        return RunResult(newest, self.done, self.val_loss, sample, None)

    def _step(self) -> None:
        config, began = self.config, time.perf_counter()
        lr = learning_rate(config, self.done)
        first = self.done * config.passes_per_step
        with self._reading():
            batches = [self.data.train.batch(first + i, config.batch_size) for i in range(config.passes_per_step)]
        result = self.session.step(self.done, lr, batches)
        self.done += 1
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise UserError(self._diverged(result.loss, result.grad_norm))
        elapsed = time.perf_counter() - began
        self._clock += elapsed
        self._clock_tokens += config.step_tokens
        if self._timed:  # the first step compiles, which says nothing about those to come
            self._spent += elapsed
            self._spent_steps += 1
        self._timed = True
        speed = self._clock_tokens / self._clock
        left = config.steps - self.done
        eta = left * self._spent / self._spent_steps if self._spent_steps else None
        share = mfu(self.flops_per_token, speed, self.peak_flops)
        self.display.step(self.done, result.loss, speed, share, eta)
        if self.done == 1 or self.done % config.log_every == 0 or self.done == config.steps:
            self._log_loss("train", result.loss, lr, speed, mfu=round(share, 4))
            self._clock, self._clock_tokens = 0.0, 0

    def _validate(self, everything: bool) -> None:
        began, total, count = time.perf_counter(), 0.0, 0
        batches = self.data.val.sequential(self.config.batch_size, 0 if everything else self.config.eval_batches)
        while True:
            with self._reading():
                batch = next(batches, None)
            if batch is None:
                break
            total += self.session.loss_sum(batch)
            count += batch[1].size
        self.val_loss = total / count
        self.display.validation(self.done, self.val_loss)
        rate = learning_rate(self.config, self.done - 1)
        self._log_loss("val", self.val_loss, rate, count / (time.perf_counter() - began))

    def _run_tasks(self) -> None:
        scorer = self.session.scorer(self.tokenizer)
        for prepared in self.tasks:
            row = metrics(prepared.run(scorer, self.config.batch_size))
            self._log(prepared.task.name, row)
            self.display.task(self.done, prepared.task.name, row)

    def _log_loss(self, split: str, loss: float, lr: float, tokens_per_sec: float, **more: float) -> None:
        rest = {"tokens_per_sec": round(tokens_per_sec, 1), "peak_memory_bytes": self.session.peak_memory_bytes()}
        self._log(split, {"loss": loss, "lr": lr, "tokens": self.done * self.config.step_tokens, **rest, **more})

    def _log(self, split: str, values: dict[str, Any]) -> None:
        row = {"step": self.done, "split": split, **values, "seconds": round(time.perf_counter() - self._began, 2)}
        self._append(METRICS, row)
        self.trackers.log(row)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        try:
            with (self.out / name).open("a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as e:
            raise UserError(f"{self.out / name}: could not be written: {e.strerror}; {self._go_on()}") from e

    def _save(self) -> None:
        config, target = self.config, checkpoint.checkpoint_path(self.out, self.done)
        info = {
            "format": 1,
            "step": self.done,
            "tokens": self.done * config.step_tokens,
            "val_loss": self.val_loss,
            "optimizer": config.optimizer,
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
        """A text from the weights as they are, a function of the seed and the step; also written to samples.jsonl."""
        config = self.config
        prompt = self.data.encoder.encode(config.sample_prompt).tolist() or [self.data.encoder.end_of_text]
        prompt = prompt[: config.model.n_positions - 1]
        length = min(config.sample_tokens, config.model.n_positions - len(prompt))
        if length < 1:
            return None
        tokens = self.session.generate(prompt, length, temp=0.8, seed=config.seed)
        text = self.tokenizer.decode(prompt + [t for t in tokens if t < self.data.encoder.end_of_text])
        self._append(SAMPLES, {"step": self.done, "text": text})
        return text

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Data that vanish or prove bad end the run; the message then says how to go on."""
        try:
            yield
        except UserError as e:
            raise UserError(f"{e}; {self._go_on()}") from e

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


@functools.cache
def _peak_flops(backend: BackendName, device: DeviceName, dtype: DType) -> float:
    """The device's measured peak, for the MFU: once a process."""
    return get_backend(backend, device).peak_flops(dtype)


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
            "restore it, or start a new run with --init"
        )
    if info["step"] >= config.steps:
        raise UserError(
            f"{out}: has finished its {info['step']} steps; give a larger --steps to go on, "
            f"or generate from it with --model {out}"
        )
    return _ResumePoint(info["step"], info["val_loss"], checkpoint.read_weights(folder, config.model), optimizer_state)


def _keep_rows_until(path: Path, step: int) -> None:
    """Drop lines that a killed run wrote after its last checkpoint; they will be written again."""
    if path.exists():
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        checkpoint.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM in a list, so that the step in hand finishes; a second Ctrl-C acts at once."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
