"""Stopping on signals, and finding the checkpoint that --auto-resume starts from."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.files import SUMS

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclasses.dataclass(frozen=True)
class Restart:
    """Where --auto-resume starts."""

    from_step: int | None
    """Step of the newest intact checkpoint; None: the run has saved none yet."""
    notes: tuple[str, ...]
    """Messages about the damaged checkpoints that were skipped."""


def find_restart(run: Path) -> Restart:
    """The newest intact checkpoint of a run folder, by its checksums.

    Raises:
        UserError: If there are checkpoints, and all of them are damaged.
    """
    notes: list[str] = []
    for folder in reversed(checkpoint.checkpoints(run)):
        problem = _problem(folder)
        if problem is None:
            return Restart(checkpoint.step_of(folder), tuple(notes))
        notes.append(f"{folder}: damaged, {problem}; resuming from an older one")
    if notes:
        raise UserError(
            f"{run}: none of its {len(notes)} checkpoints is whole (newest: "
            f"{notes[0].partition(';')[0]}); restore one, or start a new run with another --out"
        )
    return Restart(None, ())


def _problem(folder: Path) -> str | None:
    # Every checkpoint has them, since folders appear complete or not at all.
    for name in (SUMS, checkpoint.STATE, checkpoint.STATE_INFO):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        return checkpoint.integrity_error(folder) or checkpoint.has_nonfinite(folder)
    except UserError as e:
        return str(e)


@contextlib.contextmanager
def catch_signals(second_acts: bool) -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and the end of the terminal (SIGHUP) in a list, so that the current
    step can finish. Signals that the process ignores (nohup) stay ignored. Outside the main thread,
    where Python allows no handlers, the list stays empty.

    Args:
        second_acts: Whether a second Ctrl-C ends the program at once. Not under a launcher, which
            repeats the terminal's signal to its processes.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        if second_acts:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [getattr(signal, name) for name in _STOPPING if hasattr(signal, name)]
    caught_here = [s for s in numbers if signal.getsignal(s) is not signal.SIG_IGN]
    previous = {s: signal.signal(s, note) for s in caught_here}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
