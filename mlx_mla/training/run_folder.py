"""A run's folder: creating it, its settings, and the checkpoint that a run resumes from."""

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from mlx_mla import checkpoint
from mlx_mla.backends.contract import Start
from mlx_mla.data.dataset import TrainingData
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.errors import UserError, flag
from mlx_mla.files import clear_leftovers, read_toml, write_text
from mlx_mla.locks import LOCK, locked
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.presets import overlay, to_toml
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.training.metrics import METRICS, SAMPLES, plot_loss, read_metrics, read_samples

CONFIG, PLOT, LATEST = "config.toml", "loss.png", "latest"
CHECKPOINTS, TRACKING = "checkpoints", "tracking.json"

# Besides the model's shape, these decide which batch a step sees, where the run began and what it
# minimizes.
FIXED_ON_RESUME = (
    "tokenizer",
    "val_fraction",
    "batch_size",
    "grad_accum_steps",
    "seq_len",
    "seed",
    "init",
    "initializer_range",
    "initializer",
    "optimizer",
    "trainable",
    "teacher",
    "teacher_weight",
    "teacher_temperature",
)


@contextlib.contextmanager
def locked_run(out: Path) -> Iterator[None]:
    """Hold the lock of a run folder, new or old, and clear the leftovers of killed processes;
    UserError if another process holds it."""
    with locked(out, inside=True):
        clear_leftovers(out, CONFIG, LATEST, PLOT, METRICS, SAMPLES, TRACKING)
        clear_leftovers(out / CHECKPOINTS, "step-*")
        yield


def create_run(out: Path, config: TrainConfig, lock: contextlib.ExitStack) -> None:
    """Create the run folder, unless something is there that must not be overwritten.

    Args:
        lock: Takes the lock of a folder that did not exist before.
    """
    if (out / CONFIG).exists():
        raise UserError(
            f"{out}: holds another run; add --resume to continue it, or give --out a new name"
        )
    if out.is_dir():
        if any(path.name != LOCK for path in out.iterdir()):
            raise UserError(f"{out}: is not an empty folder; give --out a new name")
    else:
        lock.enter_context(locked_run(out))
    write_text(out / CONFIG, to_toml(config))
    _make_checkpoints(out)


def resume_advice(out: Path) -> str:
    """What to do about a run that has failed."""
    newest = checkpoint.latest(out)
    if newest is None:
        return "no checkpoint has been saved yet"
    remedy = f"fix the cause and add --resume --out {shlex.quote(str(out))}"
    return f"the newest good checkpoint is {newest}; {remedy}"


def finish(config: TrainConfig, out: Path, step: int) -> None:
    """Complete the folder of a finished run that was killed while it drew its last picture.

    Raises:
        UserError: If the settings or the data differ from the run's.
    """
    tokenizer = get_tokenizer(config.tokenizer, config.bpe_dir)
    config = config.resolved(tokenizer.size)
    _check_settings(config, out)
    info = checkpoint.read_train_info(checkpoint.checkpoint_path(out, step))
    _check_data(info, TrainingData(config, tokenizer), out)
    with locked_run(out):
        if not (out / PLOT).is_file():
            plot_loss(out / METRICS, out / PLOT, out.name)


def _make_checkpoints(out: Path) -> None:
    try:
        (out / CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f"{out / CHECKPOINTS}: cannot be made: {e.strerror}") from e


def run_config(out: Path) -> TrainConfig:
    """The settings that a run folder was created with."""
    if not (out / CONFIG).is_file():
        raise UserError(
            f"{out}: holds no run to resume (no {CONFIG}); leave out --resume to start one"
        )
    return overlay(TrainConfig(), read_toml(out / CONFIG), str(out / CONFIG))


def resume_point(
    config: TrainConfig, out: Path, from_step: int | None, data: TrainingData
) -> Start | None:
    """The checkpoint that a run resumes from; None: it was stopped before its first.

    Raises:
        UserError: If the settings or the data differ, or the checkpoint is damaged.
    """
    _check_settings(config, out)
    folder = checkpoint.latest(out)
    if from_step is not None:
        folder = checkpoint.checkpoint_path(out, from_step)
    if folder is None:
        return None  # stopped before its first checkpoint: start over, in the same folder
    if not folder.is_dir():
        steps = ", ".join(str(checkpoint.step_of(p)) for p in checkpoint.checkpoints(out))
        raise UserError(
            f"--from-step {from_step}: {out} has checkpoints of steps {steps or 'none'}; give one "
            "of these, or leave out --from-step"
        )
    if problem := checkpoint.integrity_error(folder):
        advice = "there is no older one"
        if older := checkpoint.before(out, folder):
            advice = f"resume from the one before with --from-step {checkpoint.step_of(older)}"
        raise UserError(f"{folder}: damaged, {problem}; {advice}")
    optimizer_state, info = checkpoint.read_train_state(folder, config)
    _check_data(info, data, out)
    if info.step >= config.steps:
        raise UserError(
            f"{out}: has finished its {info.step} steps; give a larger --steps to continue, or "
            f"generate from it with --model {shlex.quote(str(out))}"
        )
    weights = checkpoint.ModelFolder(folder).weights(config.model)
    return Start(weights, info.step, optimizer_state, info.val_loss)


def _check_settings(config: TrainConfig, out: Path) -> None:
    """UserError if a setting differs that a resumed run cannot change."""
    before = run_config(out)
    of_model = [field.name for field in dataclasses.fields(ModelConfig)]
    for where, old, new, names in (
        ("model", before.model.resolved(), config.model, of_model),
        ("run", before, config, FIXED_ON_RESUME),
    ):
        for name in names:
            if getattr(old, name) != getattr(new, name):
                raise UserError(
                    f"--resume: {flag(name)} is {getattr(old, name)} in {out} and cannot become "
                    f"{getattr(new, name)}; leave it out, or start a new {where} with another --out"
                )


def _check_data(info: checkpoint.TrainState, data: TrainingData, out: Path) -> None:
    """UserError if the data are not those of a checkpoint."""
    samples = info.data_samples_sha256 or data.samples
    if info.data_sha256 != data.fingerprint or samples != data.samples:
        raise UserError(
            f"--resume: {data.source} is not the text that {out} was trained on (its sha256 "
            "differs); restore it, or start a new run with --init"
        )


def prepare_resume(out: Path, config: TrainConfig, step: int) -> None:
    """Prepare a run folder to be resumed after a step.

    Lines that a killed run wrote after its last checkpoint are dropped; the resumed run writes them
    again. All files are read before any is written. From here on, that step's checkpoint is the
    newest, whatever an abandoned branch has saved.
    """
    kept = {
        path: [row for row in read(path) if row["step"] <= step]
        for path, read in ((out / METRICS, read_metrics), (out / SAMPLES, read_samples))
        if path.exists()
    }
    _make_checkpoints(out)
    write_text(out / CONFIG, to_toml(config))
    if step:
        write_text(out / LATEST, checkpoint.checkpoint_path(out, step).name + "\n")
    for path, rows in kept.items():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
