"""Read documents from text, JSON lines and parquet files in blocks of about 1 MB."""

import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlx_mla.data.blocks import Reading, Source, TextBlock, check_position, grouped, listed
from mlx_mla.data.corpus import COMPRESSED, JSON_LINES, PARQUET, TEXT, other_than_text
from mlx_mla.data.hub_documents import hub_sources
from mlx_mla.data.manifest import MANIFEST
from mlx_mla.errors import UserError
from mlx_mla.files import decoded, is_hub_id, parse_json

LONGEST = 16 << 20
"""Bytes without a separator after which a text file is cut at a line break."""

LONGEST_DOCUMENT = 64 << 20
"""Maximum bytes of a JSON line, and maximum characters of a text in a parquet file. Documents are
read whole, and a small compressed file can expand to gigabytes."""

_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def find_sources(src: str, reading: Reading) -> tuple[list[Source], list[str]]:
    """Find the files to read.

    Args:
        src: A file, a folder, or a dataset on the hub.

    Returns:
        The readable sources, sorted by name, and the names of the files that were left out.

    Raises:
        UserError: If there is nothing to read.
    """
    path = Path(src)
    if reading.revision is not None and path.exists():
        raise UserError(f"--revision requires a dataset on the hub, but {src} is a path")
    if path.is_file():
        if _format(path.name) is None:  # taken for text
            with path.open("rb") as f:
                kind = other_than_text(path, f.read(1 << 16))
            if kind is not None:
                raise UserError(f"{path}: is {kind}, not text; give text, JSON lines or parquet")
        return [_file(path, path.name, reading)], []
    if not path.is_dir():
        if not (re.fullmatch(r"[^:]+(:[\w.-]+)?", src) and is_hub_id(src.partition(":")[0])):
            raise UserError(
                f"{src}: no such file or folder, and not a dataset's name (OWNER/NAME:CONFIG)"
            )
        return hub_sources(src, reading), []
    found: list[Source] = []
    others: list[str] = []

    def unreadable(e: OSError) -> None:
        raise UserError(f"{e.filename}: cannot be read: {e.strerror}")

    walked = set()  # links may lead back
    for folder, names, files in os.walk(path, onerror=unreadable, followlinks=True):
        walked.add(os.path.realpath(folder))
        names[:] = sorted(
            n for n in names
            if not n.startswith(".") and not (Path(folder) / n / MANIFEST).is_file()  # shards
            and os.path.realpath(Path(folder) / n) not in walked
        )  # fmt: skip
        for name in sorted(files):
            full = Path(folder) / name
            if name.startswith("."):
                continue
            if _format(name) is None:
                others.append(full.relative_to(path).as_posix())
            else:
                found.append(_file(full, full.relative_to(path).as_posix(), reading))
    if not found:
        raise UserError(
            f"{path}: holds no files to read ({' '.join(TEXT + JSON_LINES + PARQUET)}; text and "
            f"JSON lines also compressed: {' '.join(COMPRESSED)})"
        )
    return sorted(found, key=lambda source: source.name), others


def _format(name: str) -> str | None:
    """The suffix that gives a file's format, below that of its compression; None: not read."""
    stem, suffix = os.path.splitext(name.lower())
    formats: tuple[str, ...] = TEXT + JSON_LINES + PARQUET
    if suffix in COMPRESSED:
        suffix, formats = os.path.splitext(stem)[1], TEXT + JSON_LINES
    return suffix if suffix in formats else None


def _file(path: Path, name: str, reading: Reading) -> Source:
    suffix = _format(name)
    if suffix in PARQUET:
        return ParquetSource(path, name, reading)
    return (JsonLinesSource if suffix in JSON_LINES else TextSource)(path, name, reading)


class _FileSource:
    def __init__(self, path: Path, name: str, reading: Reading):
        self.path, self.name, self.reading = path, name, reading
        try:
            self.size: float = path.stat().st_size
        except OSError as e:
            raise UserError(f"{path}: cannot be read: {e.strerror}") from None


class _StreamSource(_FileSource):
    """A file that is cut at delimiters.

    A position is [bytes, delimiters]: the numbers of uncompressed bytes and of delimiters before
    it.
    """

    delimiter: bytes
    longest: int
    """Maximum bytes of a piece that has no delimiter within it."""

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        check_position(start, list, self.name)
        offset, count = start or (0, 0)
        try:
            with self.path.open("rb") as raw:
                stream = _decompressed(raw, self.path.suffix.lower())
                _skip(stream, offset)
                for data, following in self._pieces(stream, limit, count):
                    end = [offset + len(data), following]
                    yield TextBlock(partial(self._parse, data, offset, count), end, raw.tell())
                    offset, count = end
        except _DAMAGE as e:
            if isinstance(e, OSError) and e.strerror:
                reason = e.strerror
            elif "too much memory" in str(e):
                reason = "its zstd window is over 128 MiB; compress it again without --long"
            else:
                reason = f"damaged or truncated ({e})"
            raise UserError(f"{self.path}: cannot be read: {reason}") from None

    def _pieces(self, stream: Any, limit: int, count: int) -> Iterator[tuple[bytes, int]]:
        """Cut a stream after delimiters: the last one within `limit` bytes, or else the first.

        Args:
            count: Delimiters before the stream's position.

        Yields:
            A piece, and the number of delimiters up to its end.
        """
        buffer, ended = bytearray(), False

        def fill(size: int) -> None:
            nonlocal ended
            while len(buffer) < size and not ended:
                data = stream.read(max(1 << 16, size - len(buffer)))
                ended = not data
                buffer.extend(data)

        while True:
            fill(limit)
            if not buffer:
                return
            at = buffer.rfind(self.delimiter, 0, limit)
            if at < 0:
                at = buffer.find(self.delimiter)
            while at < 0 and not ended and len(buffer) <= self.longest:
                fill(min(max(2 * len(buffer), 1 << 20), self.longest + 1))
                at = buffer.find(self.delimiter)
            cut = len(buffer) if at < 0 else at + len(self.delimiter)
            if cut > max(limit, self.longest):
                cut = self._cut(buffer, count)
            data = bytes(buffer[:cut])
            count += data.count(self.delimiter)
            yield data, count
            del buffer[:cut]

    def _cut(self, data: bytearray, count: int) -> int:
        """Where to cut more than `longest` bytes that have no delimiter."""
        raise NotImplementedError

    def _parse(self, data: bytes, offset: int, count: int) -> list[str | None]:
        """The documents of a piece, after `offset` bytes and `count` delimiters."""
        raise NotImplementedError


class TextSource(_StreamSource):
    """Plain text, split into documents at the separator."""

    longest = LONGEST

    def __init__(self, path: Path, name: str, reading: Reading):
        super().__init__(path, name, reading)
        self.delimiter = reading.separator.encode()

    def _cut(self, data: bytearray, count: int) -> int:
        """After the last line break, or else after the last whole character."""
        end = self.longest
        if cut := data.rfind(b"\n", 0, end) + 1:
            return cut
        while end > 1 and data[end] & 0xC0 == 0x80:
            end -= 1
        return end

    def _parse(self, data: bytes, offset: int, count: int) -> list[str | None]:
        documents = decoded(data, str(self.path), offset).split(self.reading.separator)
        # A separator at the end does not start an empty document.
        return list(documents if documents[-1] else documents[:-1])


class JsonLinesSource(_StreamSource):
    """JSON lines: one JSON object per line."""

    delimiter = b"\n"
    longest = LONGEST_DOCUMENT

    def _cut(self, data: bytearray, count: int) -> int:
        raise UserError(
            f"{self.path}, line {count + 1:,}: longer than {self.longest:,} bytes; cut it into "
            "documents"
        )

    def _parse(self, data: bytes, offset: int, count: int) -> list[str | None]:
        lines = enumerate(data.split(b"\n"), count + 1)
        return [self._document(line, number) for number, line in lines if line.strip()]

    def _document(self, line: bytes, number: int) -> str | None:
        where, column = f"{self.path}, line {number:,}", self.reading.column
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; every line must hold one object")
        if column not in row:
            raise UserError(
                f"{where}: has no {column!r}, but {listed(row)}; choose one with --text-column"
            )
        if not isinstance(row[column], str | None):
            raise UserError(
                f"{where}: {column!r} is not a string; choose another with --text-column"
            )
        return row[column]


class ParquetSource(_FileSource):
    """A column of a parquet file. A position is the number of rows before it."""

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        check_position(start, int, self.name)
        skip, column = start or 0, self.reading.column
        position = skip
        try:
            self._check(pq.read_schema(self.path))
            # Read as a dictionary, a text that repeats a million times is held in memory once.
            with pq.ParquetFile(self.path, read_dictionary=[column]) as file:
                groups, first = list[int](), 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if groups or first + rows > skip:
                        groups.append(group)
                    else:
                        first += rows
                batches = (
                    file.iter_batches(256, row_groups=groups, columns=[column]) if groups else []
                )
                rows_of = (text for batch in batches for text in self._texts(batch.column(0)))
                total = max(1, file.metadata.num_rows)
                for texts, position in grouped(rows_of, first, skip, limit):
                    yield TextBlock(partial(list, texts), position, self.size * position / total)
        except UnicodeDecodeError as e:
            raise UserError(
                f"{self.path}: column {column!r} is not UTF-8 after row {position:,} ({e})"
            ) from None
        except (pa.ArrowException, OSError) as e:
            reason = getattr(e, "strerror", None) or str(e).splitlines()[0]
            raise UserError(f"{self.path}: cannot be read as parquet: {reason}") from None

    def _texts(self, rows: Any) -> Iterator[str | None]:
        for row in rows:
            text = row.as_py()
            if text is not None and len(text) > LONGEST_DOCUMENT:
                raise UserError(
                    f"{self.path}: holds a text longer than {LONGEST_DOCUMENT:,} characters; cut "
                    "it into documents"
                )
            yield text

    def _check(self, schema: pa.Schema) -> None:
        column = self.reading.column
        if column not in schema.names:
            raise UserError(
                f"{self.path}: has no column {column!r}, but {listed(schema.names)}; choose one "
                "with --text-column"
            )
        if schema.names.count(column) > 1:
            raise UserError(f"{self.path}: has several columns {column!r}; rename all but one")
        stored = schema.field(column).type
        plain = stored.value_type if pa.types.is_dictionary(stored) else stored
        if not any(is_string(plain) for is_string in _STRINGS):
            raise UserError(
                f"{self.path}: column {column!r} is {stored}, not string; choose another with "
                "--text-column"
            )


def _decompressed(raw: Any, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return raw


def _skip(stream: Any, count: int) -> None:
    if isinstance(stream, pa.NativeFile | gzip.GzipFile | lzma.LZMAFile):
        while count > 0:
            count -= len(stream.read(min(count, 1 << 20))) or count
    else:
        stream.seek(count)
