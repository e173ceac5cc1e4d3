"""Stored results, read back: every value is checked before anything is written from it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typing_extensions import TypedDict

from mlx_mla.errors import UserError
from mlx_mla.fields import Bounds, not_negative, positive, value_of
from mlx_mla.files import read_json

Document = dict[str, Any]
"""What a benchmark has measured: `benchmark` (its name), `command`, `machine`, `settings`, and the
lists of rows and other values that its report reads."""


class NotEmpty(Bounds):
    """Of a list."""

    def problem(self, value: Any) -> str | None:
        return None if value else "must not be empty"


LARGEST = 1e18
"""No figure of a benchmark is larger, be it of bytes, of FLOPs or a rate."""
FIGURE, POSITIVE = not_negative(LARGEST), positive(LARGEST)
Whole = Annotated[int, FIGURE]
Figure = Annotated[float, FIGURE]
Positive = Annotated[float, POSITIVE]
Positives = Annotated[list[Positive], NotEmpty("", 0)]
Signed = Annotated[float, Bounds("be at least -1e18", -LARGEST, LARGEST)]
REMEDY = "measure again"


def record(fields: Mapping[str, Any]) -> Any:
    """The type of a dictionary with these fields."""
    return TypedDict("Row", dict(fields))  # type: ignore[operator]


def rows(fields: Mapping[str, Any]) -> Any:
    """The type of a list of dictionaries with these fields."""
    return list[record(fields)]  # type: ignore[misc]


class Stored(dict[str, Any]):
    """An object of a stored document, in which a missing value is damage."""

    def __init__(self, values: Mapping[str, Any], where: str):
        super().__init__(values)
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self._where}: {key} is missing; {REMEDY}")


def read_document(path: Path) -> Document:
    """The document in a file; UserError if it is not one."""
    stored: Any = read_json(path)
    parts = ("machine", "settings")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k), dict) for k in parts):
        raise UserError(f"{path}: not results of a benchmark")
    return stored


def checked(document: Document, parts: Mapping[str, Any], settings: type, path: Path) -> Document:
    """The document with typed values; UserError names the one that is damaged.

    Args:
        parts: Type of each value that the report reads.
        settings: Dataclass of the settings. Lists and paths among them are not read.
    """
    found = {
        name: value_of(kind, document[name], str(path), REMEDY, at=name)
        for name, kind in parts.items()
        if name in document
    }
    stored, bounds = document["settings"], settings.bounds  # type: ignore[attr-defined]
    for field in dataclasses.fields(settings):
        name, kind = field.name, field.type
        read = get_origin(kind) is not tuple and Path not in (kind, *get_args(kind))
        if read and name in stored:
            if name in bounds and isinstance(stored[name], (int, float)):
                kind = Annotated[kind, bounds[name]]
            stored[name] = value_of(kind, stored[name], str(path), REMEDY, at=f"settings.{name}")
    return Stored({**document, **found, "settings": Stored(stored, f"{path}: settings")}, str(path))
