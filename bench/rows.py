"""The rows of a benchmark that takes hours: on disk after every measurement, and gone on with."""

import json
from pathlib import Path
from typing import Any

from bench.compare_report import set_rooflines
from bench.harness import Document, Row
from mlx_mla import files
from mlx_mla.errors import UserError


class Results:
    """A document with rows and the device's rates, on disk after every change.

    Args:
        document: Of a new run.
        path: The file. None: keep nothing.
        resume: Keep the rows and rates that the file has, if it is there.

    Raises:
        UserError: If the file is no such document, or was measured on another machine.
    """

    def __init__(self, document: Document, path: Path | None, resume: bool):
        self.path = path
        self.document: Document = {**document, "rates": {}, "rows": []}
        if resume and path and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if different := [
                    k for k, v in document["machine"].items() if stored["machine"].get(k, v) != v
                ]:
                    raise UserError(
                        f"{path}: measured with another {different[0]}; give --out a new name"
                    )
                self.document["rows"], self.document["rates"] = stored["rows"], stored["rates"]
                if "baseline" in stored:
                    self.document["baseline"] = stored["baseline"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as e:
                raise UserError(
                    f"{path}: not results of this benchmark ({e}); give --out a new name"
                ) from None

    def has(self, **key: Any) -> bool:
        """Whether a row of these values is there."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.document["rows"])

    def add(self, rows: list[Row]) -> None:
        """Add rows, and save."""
        self.document["rows"] += rows
        self.save()

    def save(self) -> None:
        """Set what depends on the rates anew, and replace the file."""
        set_rooflines(self.document)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self.path, json.dumps(self.document, indent=1) + "\n")
