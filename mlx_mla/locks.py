"""Locks that keep two commands from writing into one place.

They are the kernel's file locks, and end with the process that holds them, however it ends.
"""

import contextlib
import errno
import glob
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock

from mlx_mla.errors import UserError
from mlx_mla.files import clear_leftovers, parse_json_object

LOCK = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems say that have none, as some in a network; there the user is the only guard."""


@contextlib.contextmanager
def locked(target: Path, *also: Path, inside: bool = False) -> Iterator[None]:
    """Hold the lock of what a command writes; the lock's file is removed again.

    Args:
        target: A file or a folder; a folder that is missing around it is made.
        also: What else is written beside it.
        inside: Whether the lock is in the target, a folder, and not beside it. Beside it, what
            killed commands left of the target is cleared.

    Raises:
        UserError: If another process holds it, naming that process, or it cannot be made.
    """
    whole = Path(os.path.abspath(target))
    path = whole / LOCK if inside else whole.with_name(f".{whole.name}{LOCK}")
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{target}: {_holder(path)} is writing to it; wait until it has ended, or give --out a "
            "new name"
        ) from None
    except OSError as e:
        if e.errno in _NO_LOCKS:
            yield
            return
        raise UserError(f"{target}: could not be written: {e.strerror or e}") from e
    if not inside:
        clear_leftovers(path.parent, *(glob.escape(p.name) for p in (whole, *also)))
    try:
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            path.write_text(json.dumps(_myself()) + "\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release: whoever waits for this file then opens a new one
        lock.release()


def _myself() -> dict[str, str | int]:
    command = shlex.join([sys.executable, *sys.argv])
    return {"pid": os.getpid(), "host": platform.node(), "command": command[:500]}


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        with path.open("rb") as file:
            who = parse_json_object(file.read(4096), str(path))
        return f"process {int(who['pid'])} on {who['host']!s:.64} ({who['command']!s:.120})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
