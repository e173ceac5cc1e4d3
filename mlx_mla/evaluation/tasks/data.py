"""Read evaluation files, with clear errors that name file, line and field."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError, first_line
from mlx_mla.files import parse_json_object, read_text, sha256

# Of the published files. A file with other content is used, with a warning.
SHA256 = {
    "lambada_test.jsonl": "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    "wiki.test.raw": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    "wiki.valid.raw": "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
}


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each object of a JSON-lines file, with its place for error messages."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield where, parse_json_object(line, where)


def unpublished(path: Path) -> str | None:
    """Return a warning if the file differs from the published one, whose sha256 is known for some
    files."""
    known = SHA256.get(path.name)
    if known is None or sha256(path) == known:
        return None
    return (
        f"{path}: not the published file (its sha256 differs), so scores are not comparable with "
        "published ones"
    )


def load_hub(name: str, config: str | None, split: str, where: str) -> Any:
    """Load a split of a dataset on the hub.

    Args:
        config: Its configuration.
        where: Path of the file under --data-dir that replaces the download, for the message.

    Raises:
        UserError: If it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as e:  # datasets passes through whatever its transports raise
        raise UserError(
            f"dataset {name} cannot be loaded from the hub ({first_line(e):.120}); check the "
            f"network, or put {where} into a folder and give it as --data-dir (--eval-data-dir in "
            "training)"
        ) from None
