"""The log of a run, and its speed."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError
from mlx_mla.files import finite
from mlx_mla.training.metrics import METRICS, SAMPLES, read_metrics
from mlx_mla.training.tracking import Tracking


class MetricsLog:
    """Appends rows to metrics.jsonl and samples.jsonl, and reports them to the trackers."""

    def __init__(self, out: Path, trackers: Tracking):
        self._out, self._trackers = out, trackers
        # The time at which the run would have begun if it had never stopped.
        so_far = max((row.get("seconds", 0.0) for row in read_metrics(out / METRICS)), default=0.0)
        self._began = time.perf_counter() - so_far

    def add(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl, with the seconds since the run began."""
        seconds = round(time.perf_counter() - self._began, 2)
        row = {"step": step, "split": split, **values, "seconds": seconds}
        self._append(METRICS, row)
        self._trackers.log(row)

    def sample(self, step: int, text: str) -> None:
        """Append a row to samples.jsonl."""
        self._append(SAMPLES, {"step": step, "text": text})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        try:
            with (self._out / name).open("a", encoding="utf-8") as f:
                f.write(json.dumps(finite(row)) + "\n")
        except OSError as e:
            raise UserError(f"{self._out / name}: could not be written: {e.strerror}") from e
