"""Copies of a run's metrics in TensorBoard, Weights & Biases or Trackio (--track).

Each tracker gets the rows of metrics.jsonl as scalars named SPLIT/KEY (`train/loss`, `val/loss`) at
their step. That file stays the record: a tracker that fails during training is dropped with a
warning, and the run continues.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shlex
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from mlx_mla.errors import UserError, names_in
from mlx_mla.fields import Form, read
from mlx_mla.files import write_text
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.training.run_folder import TRACKING

PROJECT = "mlx_mla"


class Tracker:
    """One run in one tool; Weights & Biases and Trackio have the same methods."""

    _run: Any

    def log(self, step: int, values: Mapping[str, float], seconds: float | None) -> None:
        """Record scalars by name; `seconds` is the training time at that step, if known."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Send what is left."""
        self._run.finish()


class TensorBoard(Tracker):
    """Event files in OUT/tensorboard.

    Every process rewrites them from the rows kept so far: TensorBoard has no other way to drop
    steps that a killed run logged after its last checkpoint. Wall times make TensorBoard's
    "relative" axis show the training time.
    """

    def __init__(self, out: Path, rows: Sequence[Mapping[str, Any]]):
        from tensorboard.summary import Writer

        folder = out / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = Writer(str(folder))
        self._began = time.time() - max((row.get("seconds", 0.0) for row in rows), default=0.0)

    def log(self, step: int, values: Mapping[str, float], seconds: float | None) -> None:
        wall_time = None if seconds is None else self._began + seconds
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, wall_time=wall_time)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB(Tracker):
    """A run of Weights & Biases, with its files in OUT/wandb; WANDB_PROJECT, WANDB_MODE and other
    variables of wandb apply. wandb itself ignores steps that it has already."""

    def __init__(self, out: Path, identity: str, settings: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=out.resolve().name,
            dir=str(out),
            config=settings,
            resume="allow",
            allow_val_change=True,  # a resumed run may have more --steps
        )

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio(Tracker):
    """A run of Trackio, in its own folder (TRACKIO_DIR) or Space (TRACKIO_SPACE_ID). Steps that are
    trained again, after a kill, are there twice."""

    def __init__(self, out: Path, identity: str, settings: dict[str, Any]):
        import trackio

        # Trackio resumes by name, so the name has to be this run's alone.
        name = f"{out.resolve().name}-{identity}"
        self._run = trackio.init(project=PROJECT, name=name, config=settings, resume="allow")


NAMES = ("tensorboard", "wandb", "trackio")


def tracker_names(text: str) -> list[str]:
    """The trackers that a --track value names, after importing each.

    Raises:
        UserError: For an unknown name, or one whose package is not installed.
    """
    names = names_in(text, NAMES, "--track")
    for name in names:
        try:
            # A plain folder of that name, such as the ./wandb that wandb writes, imports too.
            if getattr(importlib.import_module(name), "__file__", "") is None:
                raise ModuleNotFoundError(name=name)
        except ImportError as e:
            raise UserError(
                f"--track {name}: {e.name or name} is not installed; pip install {name}"
            ) from None
    return names


@dataclasses.dataclass
class _Record:
    """What OUT/tracking.json holds."""

    id: Annotated[str, Form("be the id of a run", r"[\w-]{1,64}")]
    trackers: list[str] = dataclasses.field(default_factory=list)
    """Trackers that already have the rows of earlier processes."""


class Tracking:
    """Every tracker of a run, fed row by row.

    OUT/tracking.json holds the run's id, under which a resumed run continues in each tracker, and
    the trackers that have it. A tracker that is added later first gets the rows so far.
    """

    def __init__(self, out: Path, console: Console):
        self._path, self._console = out / TRACKING, console
        self._trackers: dict[str, Tracker] = {}
        self._record = _Record(uuid.uuid4().hex[:8])
        if self._path.is_file():
            self._record = read(_Record, self._path, "remove the file")

    def start(self, name: str, config: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> None:
        """Open a tracker, and give it the rows so far unless it has them.

        Raises:
            UserError: If the tracker cannot start, for example without a login.
        """
        out, settings, record = self._path.parent, config.to_dict(), self._record
        try:
            if name == "tensorboard":
                tracker: Tracker = TensorBoard(out, rows)
            else:
                tracker = (WandB if name == "wandb" else Trackio)(out, record.id, settings)
        except Exception as e:
            raise UserError(
                f"--track {name}: could not start: {e}; set it right, or leave it out with --track "
                f"'', and add --resume --out {shlex.quote(str(out))}"
            ) from e
        self._trackers[name] = tracker
        if name not in record.trackers:
            for row in rows:
                if "split" in row:
                    self._give(name, row)
        if name != "tensorboard":
            record.trackers = sorted({*record.trackers, name})
            values = {"id": record.id, "trackers": record.trackers}
            write_text(self._path, json.dumps(values) + "\n")

    def log(self, row: Mapping[str, Any]) -> None:
        """Give a row of metrics.jsonl to every tracker."""
        for name in list(self._trackers):
            self._give(name, row)

    def close(self, failed: bool) -> None:
        """End the run in every tracker."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close(failed)
            except Exception as e:
                self._warn(name, e)

    def _give(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._trackers:
            return
        try:
            self._trackers[name].log(row["step"], scalars(row), row.get("seconds"))
        except Exception as e:  # no error of a tracker is a reason to lose a run
            del self._trackers[name]
            self._warn(name, e)

    def _warn(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())
        self._console.print(f"warning: --track {name} failed and is left out from here: {reason}")


@contextlib.contextmanager
def tracking(
    config: TrainConfig, out: Path, rows: Sequence[Mapping[str, Any]], console: Console
) -> Iterator[Tracking]:
    """The trackers of --track, open for the length of a run.

    Args:
        rows: The rows that metrics.jsonl holds already.
    """
    all_of_them = Tracking(out, console)
    failed = True
    try:
        for name in tracker_names(config.track):
            all_of_them.start(name, config, rows)
        yield all_of_them
        failed = False
    finally:
        all_of_them.close(failed)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, named SPLIT/KEY."""
    return {
        f"{row['split']}/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
