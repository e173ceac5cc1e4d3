"""Reading files with clear errors, and writing them whole or not at all, with checksums."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mlx_mla.errors import UserError

SUMS = "SHA256SUMS"

REMEDY = "remove the line"
"""What to do about a damaged line of a log."""

LARGEST_TEXT = 64 << 20
"""Bytes of a settings file, index or manifest; real ones are far smaller."""

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What some network and FUSE mounts answer when a folder is synced, which they cannot do."""


def read_text(path: Path, largest: int | None = None) -> str:
    """The content of a UTF-8 text file, without a byte-order mark.

    Args:
        largest: Most bytes to accept.

    Raises:
        UserError: If the file is missing, cannot be read, is larger, or is not UTF-8.
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
    """Parse JSON.

    Args:
        where: Name of its source, for messages.

    Raises:
        UserError: If it is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    if isinstance(text, bytes):
        text = decoded(text, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({_reason(e)})") from None


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse JSON that must be an object; errors as of `parse_json`."""
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object, but {type(values).__name__}")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file that must hold a JSON object; UserError names the file and the problem."""
    return parse_json_object(read_text(path, LARGEST_TEXT), str(path))


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON-lines file, each after the place to name in messages.

    A last line without its line break, which a killed process left, is left out. No file is no
    lines.

    Raises:
        UserError: If the file cannot be read, or a line is not JSON or longer than any that is
            written here.
    """
    try:
        if not path.exists():
            return
        with path.open("rb") as file:
            for number in itertools.count(1):
                line, where = file.readline(LARGEST_TEXT), f"{path}, line {number}"
                if len(line) == LARGEST_TEXT:
                    raise UserError(f"{where}: is longer than {LARGEST_TEXT:,} bytes; {REMEDY}")
                if not line.endswith(b"\n"):
                    return
                try:
                    yield where, parse_json(line, where)
                except UserError as e:
                    raise UserError(f"{e}; {REMEDY}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML; UserError names the source and the place of a mistake."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid TOML: {_reason(e)}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; UserError names the file and the place of a mistake."""
    return parse_toml(read_text(path, LARGEST_TEXT), str(path))


def _reason(error: Exception) -> str:
    """A parser's complaint in words that make sense to a user."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "set_int_max_str_digits" in str(error):
        return "a number of thousands of digits"
    return str(error)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write a folder that appears under its name only once it is complete and on disk.

    The caller fills the temporary folder that this yields. Then its files are listed in SHA256SUMS
    and synced, and the folder is renamed to `target`, replacing an existing one. After an error the
    temporary folder is removed and `target` is unchanged. `clear_leftovers` removes what a killed
    process leaves behind. A link stays one: the folder that it names is written.

    Raises:
        UserError: If the folder cannot be written, for example to a full disk; it names `target`.
    """
    target = Path(os.path.realpath(target))
    temporary = _temporary(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        files = sorted(p for p in temporary.iterdir() if p.is_file())
        sums = "".join(f"{sha256(p)}  {p.name}\n" for p in files if p.name != "README.md")
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        for path in [*files, temporary / SUMS]:
            _sync(path)
        _sync_folder(temporary)
        if target.exists():
            old = _temporary(target, "old")
            os.rename(target, old)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
        _sync_folder(target.parent)
    except Exception as e:
        # safetensors and tokenizers report a full disk in exceptions of their own.
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
    """Write a file that appears under its name, or replaces the old one, only once it is complete
    and on disk. Its mode is the one that the umask gives. A link stays one.

    Raises:
        UserError: If the file cannot be written, for example to a full disk; it names `path`.
    """
    path = Path(os.path.realpath(path))
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as e:
        raise UserError(f"{path}: could not be written: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def clear_leftovers(folder: Path, *names: str) -> None:
    """Remove the temporary files of killed commands, and restore what they were about to replace.
    The caller must hold the lock of `folder`.

    Args:
        names: Names or patterns of the files and folders that the commands were writing.
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
    """Give a file the mode that the umask gives new files; some libraries make theirs private."""
    probe = _temporary(path)
    with probe.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    probe.unlink()
    path.chmod(stat.S_IMODE(mode))


def _temporary(path: Path, role: str = "tmp") -> Path:
    """An unpredictable name beside a path, for a file that will become that path or that was it."""
    return path.with_name(f".{path.name}.{role}-{secrets.token_hex(8)}")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """The digests that a folder's SHA256SUMS lists, by file name.

    Raises:
        UserError: If a line is not one that `sha256sum` writes, or two lines name one file.
    """
    path, sums = folder / SUMS, dict[str, str]()
    for number, line in enumerate(read_text(path, LARGEST_TEXT).splitlines(), 1):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\x00-\x1f]+)", line)
        if found is None or found[2] in sums:
            problem = "is not a checksum and a name" if found is None else f"repeats {found[2]}"
            raise UserError(f"{path}, line {number}: {problem}")
        sums[found[2]] = found[1]
    return sums


def _sync_folder(path: Path) -> None:
    """Bring a folder's entries to disk where its file system can; files must always be synced."""
    try:
        _sync(path)
    except OSError as e:
        if e.errno not in _NO_SYNC:
            raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def decoded(data: bytes, where: str, offset: int = 0) -> str:
    """Decode UTF-8, without a byte-order mark.

    Args:
        where: Name of the source, for messages.
        offset: Number of bytes of the source that precede these.

    Raises:
        UserError: Naming the first byte that is not UTF-8.
    """
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as e:
        at = offset + len(data) - len(e.object) + e.start  # the mark is not in `e.object`
        source = "utf-16" if at == 0 and e.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise UserError(
            f"{where}: not UTF-8 text (byte {e.object[e.start]:#04x} at offset {at:,}); convert "
            f"it, for example with iconv -f {source} -t utf-8"
        ) from None


def finite(value: Any) -> Any:
    """A value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encodable(text: str) -> bool:
    """True if the string holds no lone surrogates, which JSON can spell and no encoding has."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def is_hub_id(name: str) -> bool:
    """True if a name that is no local path can be on the hub: owner/name in the hub's characters,
    where the owner is neither a local folder nor `runs`, the folder of runs."""
    owner, slash, rest = name.partition("/")
    letters = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII)
    local = owner == "runs" or owner.startswith(".") or Path(owner).exists()
    return bool(slash and letters and rest.strip(".")) and not local
