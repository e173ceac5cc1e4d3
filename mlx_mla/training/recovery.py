"""Handle signals, and find the checkpoint from which --auto-resume resumes."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.files import SUMS

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


def find_restart(run: Path) -> tuple[int | None, list[str]]:
    """Step of the newest intact checkpoint of a run folder, by its checksums, or None if it has
    none yet; and messages about damaged ones that were skipped.

    Checkpoints beyond the one that `latest` names are of a branch that --from-step has left.

    Raises:
        UserError: If there are checkpoints, but all of them are damaged.
    """
    notes: list[str] = []
    newest = checkpoint.latest(run)
    for folder in reversed(checkpoint.checkpoints(run)):
        if newest is not None and checkpoint.step_of(folder) > checkpoint.step_of(newest):
            continue
        problem = _problem(folder)
        if problem is None:
            return checkpoint.step_of(folder), notes
        notes.append(f"{folder}: damaged, {problem}; resuming from an older one")
    if notes:
        raise UserError(
            f"{run}: none of its {len(notes)} checkpoints is intact (newest: "
            f"{notes[0].partition(';')[0]}); restore one, or start a new run with another --out"
        )
    return None, []


def _problem(folder: Path) -> str | None:
    # Every intact checkpoint has these files, since folders appear complete or not at all.
    for name in (SUMS, checkpoint.STATE, checkpoint.STATE_INFO):
        if not (folder / name).is_file():
            return f"{name} is missing"
    return checkpoint.integrity_error(folder)


@contextlib.contextmanager
def catch_signals(second_acts: bool) -> Iterator[list[int]]:
    """Collect signals in a list, which lets the current step finish.

    The signals are Ctrl-C, SIGTERM and SIGHUP (the terminal was closed). Signals that the process
    ignores (nohup) stay ignored. Outside the main thread, where Python does not allow signal
    handlers, the list stays empty.

    Args:
        second_acts: True if a second Ctrl-C ends the program at once. Must be False under a
            launcher, which repeats the terminal's signal to its processes.
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
