"""`metrics.jsonl`: a line for each logged step of a run; and `samples.jsonl`."""

import json
import math
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an unfinished last line (a killed run) is left out.

    Raises:
        UserError: For a line that is no JSON object with a step, naming it.
    """
    rows = []
    if path.is_file():
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n"):
                try:
                    row = json.loads(line)
                except ValueError:  # no JSON, or no UTF-8
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    raise UserError(
                        f"{path}, line {number}: damaged, it is no JSON object with a step; "
                        "remove the line"
                    )
                rows.append(row)
    return rows


def perplexity_text(loss: float) -> str:
    """The perplexity of a loss in nats, with the figures that mean something."""
    if loss >= math.log(1e6):  # of a model that has learned nothing, the order of magnitude
        return f"{math.exp(loss):.2g}" if loss < 700 else "over 1e304"
    return f"{math.exp(loss):.2f}"
