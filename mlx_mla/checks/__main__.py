"""How `doctor --check` runs a row: `python -m mlx_mla.checks NAME`, which prints each part of its
outcome as a line of JSON. Without a name: writes the rows into docs/untested-on-apple.md."""

import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlx_mla.checks.commands import ROOT
from mlx_mla.checks.row import Outcome, Row
from mlx_mla.checks.rows import ROWS
from mlx_mla.display import markdown_table
from mlx_mla.errors import first_line

PAGE = ROOT / "docs" / "untested-on-apple.md"


def main(argv: list[str]) -> None:
    if not argv:
        PAGE.write_text(with_rows(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    (row,) = (row for row in ROWS if row.name == argv[0])
    for part in _parts(row):
        print(json.dumps(dataclasses.asdict(part)), flush=True)


def with_rows(page: str) -> str:
    """The page with the table of all rows in place of its first table."""
    rows = [(f"`{r.name}`", r.what, ", ".join(map(_place, r.where)), r.expected) for r in ROWS]
    table = "".join(
        f"{line}\n" for line in markdown_table(("row", "what", "where", "expected"), rows)
    )
    return re.sub(r"(^\|.*\n)+", lambda _: table, page, count=1, flags=re.MULTILINE)


def _parts(row: Row) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory(prefix="mlx-mla-check-") as place:
        try:
            yield from row.run(Path(place))
        except Exception as e:
            yield Outcome(False, f"{type(e).__name__}: {first_line(e)}")


def _place(where: str) -> str:
    file, _, symbol = where.partition(":")
    return f"`{symbol}` in `{file}`" if symbol else f"`{file}`"


if __name__ == "__main__":
    main(sys.argv[1:])
