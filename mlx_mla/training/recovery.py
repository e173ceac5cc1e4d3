"""Stopping in good order, and going on after a stop in bad order."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.files import SUMS


@dataclasses.dataclass(frozen=True)
class Restart:
    """Where --auto-resume goes on."""

    from_step: int | None
    """Step of the newest whole checkpoint; None: the run has saved none yet."""
    notes: tuple[str, ...]
    """What was passed over, for the user to read."""


def find_restart(run: Path) -> Restart:
    """The newest whole checkpoint of a run folder, by its checksums.

    Raises:
        UserError: If there are checkpoints, and all are damaged.
    """
    notes: list[str] = []
    for folder in reversed(checkpoint.checkpoints(run)):
        problem = _problem(folder)
        if problem is None:
            return Restart(checkpoint.step_of(folder), tuple(notes))
        notes.append(f"{folder}: damaged, {problem}; going on from an older one")
    if notes:
        raise UserError(
            f"{run}: none of its {len(notes)} checkpoints is whole (newest: "
            f"{notes[0].partition(';')[0]}); "
            "restore one, or start a new run with another --out"
        )
    return Restart(None, ())


def _problem(folder: Path) -> str | None:
    for name in (
        SUMS,
        checkpoint.STATE,
        checkpoint.STATE_INFO,
    ):  # always there: folders appear whole
        if not (folder / name).is_file():
            return f"{name} is missing"
    return checkpoint.damage(folder)


@contextlib.contextmanager
def catch_signals(second_acts: bool) -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM in a list, so that the step in hand finishes.

    Args:
        second_acts: A second Ctrl-C ends the program at once. Not under a launcher, which passes on
            to its processes what the terminal has sent them already.
    """
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if second_acts:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
