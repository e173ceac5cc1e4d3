"""The manifest of a folder of token shards, which `mlx_mla.prepare` writes and resumes from."""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from mlx_mla.errors import UserError, shown
from mlx_mla.fields import Count, FileName, Name, Sha256, value_of
from mlx_mla.files import read_json

MANIFEST = "manifest.json"
_REMEDY = "remove it and prepare the data again"


class _Shard(TypedDict):
    file: FileName
    split: Literal["train", "val"]
    tokens: Count
    documents: Count
    sha256: Sha256


class _Tokenizer(TypedDict):
    name: Name
    identity: NotRequired[Name]


class _Manifest(TypedDict):
    complete: bool
    settings: dict[str, Any]
    tokenizer: _Tokenizer
    sources: list[tuple[str, Any]]
    """Names of the sources, each with its size or another value that changes with the source."""
    empty_documents: Count
    shards: list[_Shard]


_Position = Count | tuple[Count, Count] | dict[str, Any] | None
"""Position where the next block of a source begins (documents.py)."""


class _Place(TypedDict):
    file: Count
    """Index of the next source to open."""
    open: list[tuple[Count, _Position]]
    """Indices of the open sources, each with the position where it resumes."""


class _Unfinished(_Manifest):
    parts: list[_Shard]
    next: _Place


def read_manifest(folder: Path, to_resume: bool = False) -> dict[str, Any]:
    """Read the manifest of a folder that `mlx_mla.prepare` wrote.

    Args:
        to_resume: Also check the fields that are needed only to resume a preparation.

    Raises:
        UserError: If the manifest is of another version, or holds anything that `prepare` does not
            write, such as a file outside the folder.
    """
    path = folder / MANIFEST
    values = read_json(path)
    if values.get("format") != 1:
        raise UserError(
            f"{path}: format {shown(values.get('format'))}, and this version reads 1; prepare the "
            "data again"
        )
    unfinished = to_resume and values.get("complete") is False
    value_of(_Unfinished if unfinished else _Manifest, values, str(path), _REMEDY)
    if unfinished:
        following, opened = values["next"]["file"], [file for file, _ in values["next"]["open"]]
        if following > len(values["sources"]) or len(set(opened)) < len(opened):
            raise UserError(f"{path}: next is not a place in its sources; {_REMEDY}")
        if any(file >= following for file in opened):
            raise UserError(f"{path}: next.open names a source that comes later; {_REMEDY}")
    return values
