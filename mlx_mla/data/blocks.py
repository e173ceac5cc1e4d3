"""What every source of documents has: blocks, and positions between them.

The end of a block depends only on its start and on the source. Reading can therefore stop after any
block and resume there in another process. A block is parsed later, by the thread that tokenizes it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mlx_mla.errors import UserError, shown


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


def check_position(start: Any, expected: type, name: str) -> None:
    """Refuse a position of another type than those of the source `name`; raises UserError."""
    if start is not None and not isinstance(start, expected):
        raise UserError(
            f"{name}: the manifest resumes at {shown(start)}, which is not a position in this file"
        )


def grouped(
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


def listed(names: Any) -> str:
    """Names for a message."""
    return ", ".join(map(repr, names)) or "nothing"
