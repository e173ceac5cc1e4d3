"""The rows of a benchmark that takes hours: on disk after every measurement, and gone on with."""

import json
from pathlib import Path
from typing import Any

from bench.compare_report import set_rooflines
from bench.harness import Document, Row
from mlx_mla import files
from mlx_mla.errors import UserError

SAME = ("dtype", "quick")
"""Settings that rows of one file share."""


class Results:
    """A document with rows and what parity found, on disk after every change.

    Args:
        document: Of a new run.
        path: The file. None: keep nothing.
        resume: Keep the rows and what parity found that the file has, if it is there.

    Raises:
        UserError: If the file is no such document, or was measured on another machine or in
            another way.
    """

    def __init__(self, document: Document, path: Path | None, resume: bool):
        self.path = path
        self.document: Document = {**document, "parity": [], "rows": []}
        if resume and path and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if different := [
                    k for k, v in document["machine"].items() if stored["machine"].get(k, v) != v
                ]:
                    raise UserError(
                        f"{path}: measured with another {different[0]}; give --out a new name"
                    )
                for name in SAME:
                    if stored["settings"][name] != (own := document["settings"][name]):
                        raise UserError(
                            f"{path}: measured with {name} {stored['settings'][name]}, not {own}; "
                            "give --out a new name"
                        )
                self.document["rows"], self.document["parity"] = stored["rows"], stored["parity"]
                if "baseline" in stored:
                    self.document["baseline"] = stored["baseline"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as e:
                raise UserError(
                    f"{path}: not results of this benchmark ({e}); give --out a new name"
                ) from None

    def has(self, **key: Any) -> bool:
        """Whether a row of these values is there."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.document["rows"])

    def set_parity(self, found: list[Row]) -> None:
        """Set what the parity gate found, for the subjects that it looked at, and save."""
        looked_at = {(f["backend"], f["model"]) for f in found}
        kept = [f for f in self.document["parity"] if (f["backend"], f["model"]) not in looked_at]
        self.document["parity"] = kept + found
        self.save()

    def add(self, rows: list[Row]) -> None:
        """Add rows, and save."""
        self.document["rows"] += rows
        self.save()

    def save(self) -> None:
        """Set what depends on the rates of rows, and replace the file."""
        set_rooflines(self.document)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self.path, json.dumps(self.document, indent=1) + "\n")
