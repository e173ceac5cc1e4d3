"""Files read with what is wrong told, and written whole or not at all, with the checksums that
tell."""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mla.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUMS = "SHA256SUMS"

LARGEST_TEXT = 64 << 20
"""Bytes of a settings file, index or manifest: far more than any of them has."""


def read_text(path: Path, largest: int | None = None) -> str:
    """A text file in UTF-8, without the byte-order mark that some editors put in front.

    Args:
        largest: Refuse more bytes than these.

    Raises:
        UserError: If it is missing, cannot be read, is larger, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(-1 if largest is None else largest + 1)
        if largest is not None and len(data) > largest:
            raise UserError(f"{path}: is larger than {largest:,} bytes; it is another kind of file")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    return decoded(data, str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """The value that JSON text spells.

    Args:
        where: Name of its source, for messages.

    Raises:
        UserError: If it is no JSON, is nested too deeply, or has an integer of thousands of digits.
    """
    if isinstance(text, bytes):
        text = decoded(text, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({_fault(e)})") from None


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """As `parse_json`, for text that must spell an object."""
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object, but {type(values).__name__}")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; UserError naming the file and the fault."""
    return parse_json_object(read_text(path, LARGEST_TEXT), str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """The values in TOML text; UserError with the place of the fault."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid TOML: {_fault(e)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file; UserError naming the file and the fault."""
    return parse_toml(read_text(path, LARGEST_TEXT), str(path))


def _fault(error: Exception) -> str:
    """What a parser found, in words that make sense in a message."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "set_int_max_str_digits" in str(error):
        return "a number of thousands of digits"
    return str(error)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Make a folder that appears under its name only once it is whole and on disk.

    The caller fills the temporary folder it is given. On leaving, its files are listed in
    SHA256SUMS, synced, and the folder is renamed to `target`, replacing one that is there. On an
    error the temporary folder is removed and `target` is left as it was. What a kill leaves behind
    is cleared by `clear_leftovers`.

    Raises:
        UserError: If the disk is full or refuses to be written; the message names `target`.
    """
    temporary = _temporary(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        sums = "".join(f"{sha256(p)}  {p.name}\n" for p in files if p.name != "README.md")
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        for path in [*files, temporary / SUMS, temporary]:
            _fsync(path)
        if target.exists():
            old = _temporary(target, "old")
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


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name, or replaces the one there, only once it is whole
    and on disk; with the mode that the umask gives.

    Raises:
        UserError: If the disk is full or refuses to be written; the message names `path`.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as e:
        raise UserError(f"{path}: could not be written: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def clear_leftovers(folder: Path, *names: str) -> None:
    """Remove what killed commands left half-written beside files or folders, and put back what they
    were about to replace. Only for who holds the lock of `folder`.

    Args:
        names: Of the files and folders, or patterns of them.
    """
    for name in names:
        for old in folder.glob(f".{name}.old-*"):
            replaced = folder / old.name[1:].rpartition(".old-")[0]
            if not replaced.exists():
                with contextlib.suppress(OSError):
                    os.rename(old, replaced)
        for leftover in [*folder.glob(f".{name}.tmp-*"), *folder.glob(f".{name}.old-*")]:
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)


def give_usual_mode(path: Path) -> None:
    """Give a file the mode that the umask gives new ones; some libraries make theirs private."""
    probe = _temporary(path)
    with probe.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    probe.unlink()
    path.chmod(stat.S_IMODE(mode))


def _temporary(path: Path, kind: str = "tmp") -> Path:
    """A name beside a path that nobody can guess, for what becomes that path or was it."""
    return path.with_name(f".{path.name}.{kind}-{secrets.token_hex(8)}")


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


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """UTF-8 bytes as text, without the byte-order mark that some editors put in front.

    Args:
        where: Name of their source, for messages.
        offset: How many bytes of the source are before these.

    Raises:
        UserError: Naming the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as e:
        at = offset + len(data) - len(e.object) + e.start  # the mark is not in `e.object`
        raise UserError(
            f"{where}: not UTF-8 text (byte {e.object[e.start]:#04x} at offset {at:,}); convert "
            "it, for example with iconv -f latin1 -t utf-8"
        ) from None


def encodable(text: str) -> bool:
    """Whether a text is one: JSON's escapes also spell halves of characters (surrogates), which no
    encoding has."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no local path is the hub's: owner/name, in its letters, and the owner
    is no folder here, nor the one that runs go into."""
    owner, slash, rest = name.partition("/")
    letters = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII)
    local = owner == "runs" or owner.startswith(".") or Path(owner).exists()
    return bool(slash and letters and rest.strip(".")) and not local
