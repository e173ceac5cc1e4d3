"""Read documents from text, JSON lines, parquet and the Hugging Face hub in blocks of about 1 MB.

The end of a block depends only on its start and on the file. Reading can therefore stop after any
block and resume there in another process. A block is parsed later, by the thread that tokenizes it.
"""

import dataclasses
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from mlx_mla.data.corpus import COMPRESSED, JSON_LINES, PARQUET, TEXT
from mlx_mla.errors import UserError, shown
from mlx_mla.files import decoded, parse_json

LONGEST = 16 << 20
"""Bytes without a separator after which a text file is cut at a line break."""

LONGEST_DOCUMENT = 64 << 20
"""Maximum bytes of a JSON line, and maximum characters of a text in a parquet file. Documents are
read whole, and a small compressed file can expand to gigabytes."""

_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclasses.dataclass(frozen=True)
class TextBlock:
    """Consecutive documents of a source."""

    documents: Callable[[], list[str | None]]
    """Parses the documents. Raises a UserError that names the file and the place."""
    end: Any
    """Position where the next block begins, as a JSON value."""
    done: float
    """Amount of the source's `size` that has been read."""


class Source(Protocol):
    """A local file, or one file of a dataset on the hub."""

    name: str
    size: float
    """Size in the unit of `TextBlock.done`, which is the same for all sources of a run. 0:
    unknown."""

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        """Yield the blocks of the source.

        Args:
            start: `end` of the previous block; None: the beginning.
            limit: Maximum bytes of a block with more than one document.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings for reading files."""

    column: str = "text"
    """Column of a parquet file, or key of a JSON line, that holds the text."""
    separator: str = "<|endoftext|>"
    """Separator between the documents of a text file."""
    revision: str | None = None
    """Commit, branch or tag of a dataset on the hub. None: the newest commit."""


def find_sources(src: str, reading: Reading) -> tuple[list[Source], list[str]]:
    """Find the files to read.

    Args:
        src: A file, a folder, or a dataset on the hub.
        reading: Settings for reading the files.

    Returns:
        The readable sources, sorted by name, and the names of the files that were left out.

    Raises:
        UserError: If there is nothing to read.
    """
    path = Path(src)
    if path.is_file():
        return [_file(path, path.name, reading, TEXT[0])], []
    if not path.is_dir():
        from mlx_mla.files import is_hub_id  # imports transformers, which only this needs

        if not (re.fullmatch(r"[^:]+(:[\w.-]+)?", src) and is_hub_id(src.partition(":")[0])):
            raise UserError(
                f"{src}: no such file or folder, and not a dataset's name (OWNER/NAME:CONFIG)"
            )
        return _hub(src, reading), []
    found: list[Source] = []
    others: list[str] = []

    def unreadable(e: OSError) -> None:
        raise UserError(f"{e.filename}: cannot be read: {e.strerror}")

    for folder, names, files in os.walk(path, onerror=unreadable):
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            full = Path(folder) / name
            if name.startswith("."):
                continue
            if _kind(name) is None:
                others.append(full.relative_to(path).as_posix())
            else:
                found.append(_file(full, full.relative_to(path).as_posix(), reading))
    if not found:
        kinds = " ".join(TEXT + JSON_LINES + PARQUET)
        raise UserError(
            f"{path}: holds no files to read ({kinds}; text and JSON lines also compressed: "
            f"{' '.join(COMPRESSED)})"
        )
    return sorted(found, key=lambda source: source.name), others


def _kind(name: str) -> str | None:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSED:
        suffix = os.path.splitext(stem)[1]
        return None if suffix in PARQUET else suffix if suffix in TEXT + JSON_LINES else None
    return suffix if suffix in TEXT + JSON_LINES + PARQUET else None


def _file(path: Path, name: str, reading: Reading, otherwise: str | None = None) -> Source:
    kind = _kind(name) or otherwise
    assert kind is not None
    maker = (
        ParquetSource if kind in PARQUET else JsonLinesSource if kind in JSON_LINES else TextSource
    )
    return maker(path, name, reading)


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
    longest: int | None = None
    refused: int | None = None

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        _check_place(start, list, self.name)
        offset, count = start or (0, 0)
        try:
            with self.path.open("rb") as raw:
                stream = _decompressed(raw, self.path.suffix.lower())
                _skip(stream, offset)
                for data in _pieces(stream, self.delimiter, limit, self.longest, self.refused):
                    if self.refused and len(data) > max(limit, self.refused):
                        raise UserError(
                            f"{self.path}, line {count + 1:,}: longer than {self.refused:,} bytes; "
                            "cut it into documents"
                        )
                    end = [offset + len(data), count + data.count(self.delimiter)]
                    yield TextBlock(self._parser(data, offset, count), end, raw.tell())
                    offset, count = end
        except _DAMAGE as e:
            if isinstance(e, OSError) and e.strerror:
                reason = e.strerror
            elif "too much memory" in str(e):
                reason = "its zstd window is over 128 MiB; compress it again without --long"
            else:
                reason = f"damaged or truncated ({e})"
            raise UserError(f"{self.path}: cannot be read: {reason}") from None

    def _parser(self, data: bytes, offset: int, count: int) -> Callable[[], list[str | None]]:
        raise NotImplementedError


class TextSource(_StreamSource):
    """Plain text, split into documents at the separator."""

    longest = LONGEST

    def __init__(self, path: Path, name: str, reading: Reading):
        super().__init__(path, name, reading)
        self.delimiter = reading.separator.encode()

    def _parser(self, data: bytes, offset: int, count: int) -> Callable[[], list[str | None]]:
        def parse() -> list[str | None]:
            text = decoded(data, str(self.path), offset)
            documents = text.split(self.reading.separator)
            # A separator at the end does not start an empty document.
            return list(documents if documents[-1] else documents[:-1])

        return parse


class JsonLinesSource(_StreamSource):
    """JSON lines: one JSON object per line."""

    delimiter = b"\n"
    refused = LONGEST_DOCUMENT

    def _parser(self, data: bytes, offset: int, count: int) -> Callable[[], list[str | None]]:
        def parse() -> list[str | None]:
            lines = enumerate(data.split(b"\n"), count + 1)
            return [self._document(line, number) for number, line in lines if line.strip()]

        return parse

    def _document(self, line: bytes, number: int) -> str | None:
        where, column = f"{self.path}, line {number:,}", self.reading.column
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; every line must hold one object")
        if column not in row:
            raise UserError(
                f"{where}: has no {column!r}, but {_names(row)}; choose one with --text-column"
            )
        if not isinstance(row[column], str | None):
            raise UserError(
                f"{where}: {column!r} is not a string; choose another with --text-column"
            )
        return row[column]


class ParquetSource(_FileSource):
    """A column of a parquet file. A position is the number of rows before it."""

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        _check_place(start, int, self.name)
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
                for texts, position in _grouped(rows_of, first, skip, limit):
                    yield TextBlock(_constant(texts), position, self.size * position / total)
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
                f"{self.path}: has no column {column!r}, but {_names(schema.names)}; choose one "
                "with --text-column"
            )
        kind = schema.field(column).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_string(plain) for is_string in _STRINGS):
            raise UserError(
                f"{self.path}: column {column!r} is {kind}, not string; choose another with "
                "--text-column"
            )


class HubSource:
    """One file of a dataset that `datasets` streams.

    A position is the dataset's state and the number of rows before it.
    """

    def __init__(self, dataset: Any, name: str, size: float, column: str):
        self.dataset, self.name, self.size, self.column = dataset, name, size, column

    def blocks(self, start: Any, limit: int) -> Iterator[TextBlock]:
        done = 0
        _check_place(start, dict, self.name)
        if start is not None:
            self.dataset.load_state_dict(start["state"])
            done = start["rows"]
        try:
            for texts, end in _grouped(map(self._text, self.dataset), done, done, limit):
                yield TextBlock(
                    _constant(texts), {"rows": end, "state": self.dataset.state_dict()}, end
                )
        except UserError:
            raise
        except Exception as e:  # datasets, fsspec and the network raise many types
            raise UserError(
                f"{self.name}: reading failed ({type(e).__name__}: {_first_line(e)}); run the "
                "command again to resume"
            ) from e

    def _text(self, row: dict[str, Any]) -> str | None:
        if self.column not in row or not isinstance(row[self.column], str | None):
            raise UserError(
                f"{self.name}: has no text column {self.column!r}, but {_names(row)}; choose one "
                "with --text-column"
            )
        return row[self.column]


def _check_place(start: Any, kind: type, name: str) -> None:
    if start is not None and not isinstance(start, kind):
        raise UserError(
            f"{name}: the manifest resumes at {shown(start)}, which is not a position in this file"
        )


def _hub(src: str, reading: Reading) -> list[Source]:
    import datasets  # slow to import, and needed only here
    from huggingface_hub import HfApi

    name, _, config = src.partition(":")
    try:
        # The commit becomes part of the sources' names, so a preparation never resumes with other
        # data.
        commit = HfApi().dataset_info(name, revision=reading.revision).sha or ""
        data = datasets.load_dataset(
            name, config or None, split="train", streaming=True, revision=commit or None
        )
        files = data.num_shards
        splits = data.info.splits or {}
        rows = splits["train"].num_examples if "train" in splits else 0
    except Exception as e:  # datasets, fsspec and the network raise many types
        raise UserError(
            f"{src}: no such file or folder, and the dataset could not be opened "
            f"({type(e).__name__}: {_first_line(e)})"
        ) from None
    return [
        HubSource(
            data.shard(files, i), f"{src}@{commit}#{i:05d}", (rows or 0) / files, reading.column
        )
        for i in range(files)
    ]


def _grouped(
    texts: Iterator[str | None], first: int, skip: int, limit: int
) -> Iterator[tuple[list[str | None], int]]:
    """Group the rows after row `skip` into groups of about `limit` characters.

    Args:
        texts: The rows' texts, from row `first` on.
        first: Number of rows before `texts`.
        skip: Number of rows to leave out, counted from the start of the file.
        limit: Characters after which a group is complete.

    Yields:
        A group, and the number of rows up to its end.
    """
    group: list[str | None] = []
    size, end = 0, first
    for text in texts:
        end += 1
        if end <= skip:
            continue
        group.append(text)
        size += len(text or "")
        if size >= limit:
            yield group, end
            group, size = [], 0
    if group:
        yield group, end


def _pieces(
    stream: Any, delimiter: bytes, limit: int, longest: int | None, refused: int | None
) -> Iterator[bytes]:
    """Cut a stream after delimiters: the last one within `limit` bytes, or else the first.

    Args:
        stream: A binary stream.
        delimiter: The bytes after which to cut.
        limit: Preferred maximum bytes of a piece.
        longest: If this many bytes hold no delimiter, cut after the last line break among them, or
            else after the last whole character.
        refused: If this many bytes hold no delimiter, cut there or shortly after. The caller
            refuses such a piece.
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
        cut = buffer.rfind(delimiter, 0, limit) + len(delimiter)
        if cut < len(delimiter):
            at, searched = -1, 0
            while (
                at < 0
                and not (ended and searched >= len(buffer))
                and not (longest and searched >= longest)
                and not (refused and searched > refused)
            ):
                fill(min(max(2 * searched, limit, 1 << 20), (refused or 1 << 62) + 1))
                at = buffer.find(delimiter, max(0, searched - len(delimiter)))
                searched = len(buffer)
            cut = at + len(delimiter) if at >= 0 else len(buffer)
            if longest is not None and cut > longest:
                cut = buffer.rfind(b"\n", 0, longest) + 1 or _character_end(buffer, longest)
        if not cut:
            return
        yield bytes(buffer[:cut])
        del buffer[:cut]


def _character_end(data: bytearray, at: int) -> int:
    while at > 1 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


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


def _constant(value: list[str | None]) -> Callable[[], list[str | None]]:
    return lambda: value


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [""])[0]
