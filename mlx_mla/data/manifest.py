"""The manifest of a folder of token shards: what `mlx_mla.prepare` has written there, and from
where it goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError, shown
from mlx_mla.files import read_json

MANIFEST = "manifest.json"


def read_manifest(folder: Path, to_go_on: bool = False) -> dict[str, Any]:
    """The manifest of a folder that `mlx_mla.prepare` wrote.

    Args:
        to_go_on: Also check what only a preparation that goes on reads.

    Raises:
        UserError: If it is of another version, or holds anything that `prepare` does not write:
            above all files that are not in the folder itself.
    """
    path = folder / MANIFEST
    values = read_json(path)
    if values.get("format") != 1:
        raise UserError(
            f"{path}: format {shown(values.get('format'))}, and this version reads 1; prepare the "
            "data again"
        )
    unfinished = to_go_on and values.get("complete") is False
    for name, holds in (_MANIFEST | (_UNFINISHED if unfinished else {})).items():
        if not holds(values.get(name)):
            raise UserError(
                f"{path}: not a manifest of mlx_mla.prepare (its {name!r} is "
                f"{shown(values.get(name))}); remove it"
            )
    if unfinished and values["next"]["file"] > len(values["sources"]):
        raise UserError(f"{path}: damaged, it goes on after its last source; remove it")
    return values


def _is_shard(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("file", "split", "sha256"))
        and all(_is_count(row.get(name)) for name in ("tokens", "documents"))
        and Path(row["file"]).name == row["file"]
        and row["split"] in ("train", "val")
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_shards(rows: Any) -> bool:
    return isinstance(rows, list) and all(map(_is_shard, rows))


def _are_sources(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in rows
    )


def _is_place(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("open"), list):
        return False
    following, opened = value.get("file"), value["open"]
    return (
        _is_count(following)
        and all(isinstance(o, list) and len(o) == 2 and _is_count(o[0]) for o in opened)
        and all(file < following and _is_position(position) for file, position in opened)
        and len({file for file, _ in opened}) == len(opened)
    )


def _is_position(value: Any) -> bool:
    """Whether a source may have said that its next block begins there (documents.py)."""
    if isinstance(value, list):
        return len(value) == 2 and all(map(_is_count, value))
    return value is None or _is_count(value) or isinstance(value, dict)


_MANIFEST: dict[str, Callable[[Any], bool]] = {
    "complete": lambda value: isinstance(value, bool),
    "settings": lambda value: isinstance(value, dict),
    "tokenizer": lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
    "sources": _are_sources,
    "empty_documents": _is_count,
    "shards": _are_shards,
}
_UNFINISHED = {"parts": _are_shards, "next": _is_place}
"""What the fields of a manifest must be; the second, of a preparation that was not finished."""
