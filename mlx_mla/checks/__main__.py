"""How `doctor --check` runs a row: `python -m mlx_mla.checks NAME`, which prints its outcome as one
line of JSON. Without a name: the text of docs/untested-on-apple.md."""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from mlx_mla.checks import page
from mlx_mla.checks.row import Outcome
from mlx_mla.checks.rows import ROWS


def main(argv: list[str]) -> None:
    if not argv:
        print(page.untested(), end="")
        return
    (row,) = (row for row in ROWS if row.name == argv[0])
    with tempfile.TemporaryDirectory(prefix="mlx-mla-check-") as place:
        try:
            outcome = row.run(Path(place))
        except Exception as e:
            lines = str(e).strip().splitlines() or ["no message"]
            outcome = Outcome(False, f"{type(e).__name__}: {lines[0]}")
    print(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1:])
