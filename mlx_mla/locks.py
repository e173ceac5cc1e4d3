"""Locks that keep two commands from writing to one place.

They are the kernel's file locks, which end with the process that holds them, however it ends.
"""

import contextlib
import dataclasses
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
from mlx_mla.fields import Count, read
from mlx_mla.files import clear_leftovers

LOCK = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems without locks, such as some network ones; there nothing guards."""


@contextlib.contextmanager
def locked(target: Path, *also: Path, inside: bool = False) -> Iterator[None]:
    """Hold the lock of what a command writes, and remove the lock's file afterwards.

    Args:
        target: A file or a folder; its parent folders are made if missing, and removed at the end
            if nothing was written.
        also: What else the command writes in the same folder.
        inside: Whether the lock is inside the target, a folder, instead of beside it. If beside,
            the leftovers of killed commands are cleared.

    Raises:
        UserError: If another process holds the lock, naming it, or the lock cannot be made.
    """
    whole = Path(os.path.realpath(target))
    path = whole / LOCK if inside else whole.with_name(f".{whole.name}{LOCK}")
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{target}: {_holder(path)} is writing to it; wait until it ends, or give --out a new "
            "name"
        ) from None
    except OSError as e:
        if e.errno in _NO_LOCKS:
            yield
            return
        raise UserError(f"{target}: could not be written: {e.strerror or e}") from e
    if not inside:
        clear_leftovers(path.parent, *(glob.escape(p.name) for p in (whole, *also)))
    try:
        with contextlib.suppress(OSError):  # on a full disk; the lock holds nevertheless
            path.write_text(json.dumps(dataclasses.asdict(_myself())) + "\n", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # before the release, so that whoever waits for this file opens a new one
            for folder in missing:
                folder.rmdir()  # of an empty one
        lock.release()


@dataclasses.dataclass(frozen=True)
class _Process:
    pid: Count
    host: str
    command: str


def _myself() -> _Process:
    command = shlex.join([sys.executable, *sys.argv])
    return _Process(os.getpid(), platform.node(), command[:500])


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        who = read(_Process, path)
    except UserError:
        return "another process"
    return f"process {who.pid} on {who.host:.64} ({who.command:.120})"
