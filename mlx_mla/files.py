"""Files and folders that appear whole or not at all, with the checksums that tell."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError

SUMS = "SHA256SUMS"


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Make a folder that appears under its name only once it is whole and on disk.

    The caller fills the temporary folder it is given. On leaving, its files are listed in
    SHA256SUMS, synced, and the folder is renamed to `target`, replacing one that is there. On an
    error the temporary folder is removed and `target` is left as it was.

    Raises:
        UserError: If the disk is full or refuses to be written; the message names `target`.
    """
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        sums = "".join(f"{sha256(p)}  {p.name}\n" for p in files if p.name != "README.md")
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        for path in [*files, temporary / SUMS, temporary]:
            _fsync(path)
        if target.exists():
            old = target.with_name(f".{target.name}.old-{os.getpid()}")
            os.rename(target, old)
            os.rename(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
        _fsync(target.parent)
    except Exception as e:
        # safetensors and tokenizers tell of a full disk in exceptions of their own.
        if isinstance(e, OSError) or "(os error " in str(e):
            reason = getattr(e, "strerror", None) or e
            raise UserError(
                f"{target}: could not be written: {reason}; nothing there was changed"
            ) from e
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as e:
        raise UserError(f"{path}: could not be written: {e.strerror or e}") from e
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, in UTF-8.

    Raises:
        UserError: Naming the file, if it cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 (at byte {e.start}), as JSON must be") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None
    except RecursionError:
        raise UserError(f"{path}: its JSON is nested too deeply to be read") from None
    except ValueError:
        raise UserError(f"{path}: holds a number of thousands of digits") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object, but {type(values).__name__}")
    return values


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
