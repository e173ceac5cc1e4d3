"""Scores of single items on disk, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, Scores
from mlx_mla.files import parse_json


class ItemStore:
    """A file of JSON lines `{"i", "logprob", "greedy"}` for one model and task.

    Args:
        folder: Where the files are; made when the first item is added.
        settings: What the scores depend on beside the requests; another setting has another file.
    """

    def __init__(self, folder: Path, settings: Sequence[str]):
        self.folder, self.settings = folder, list(settings)
        self.path: Path | None = None

    def read(self, requests: Sequence[Request]) -> dict[int, Scores]:
        """The stored scores for exactly these requests; call it before `add`."""
        key = hashlib.sha256(json.dumps(self.settings).encode())
        for request in requests:
            key.update(repr((request.context, request.targets)).encode())
        self.path = self.folder / f"{self.settings[-2]}-{key.hexdigest()[:16]}.jsonl"
        found = {}
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            for number, line in enumerate(lines, 1):
                try:
                    row = parse_json(line, f"{self.path}, line {number}")
                except UserError:
                    continue  # the line that was being written when the run ended
                scores = _scores(row, requests)
                if scores is None:
                    raise UserError(
                        f"{self.path}, line {number}: damaged, it holds no scores of an item; "
                        "remove the line"
                    )
                found[row["i"]] = scores
        return found

    def add(self, index: int, scores: Scores) -> None:
        """Append the scores of a request."""
        assert self.path is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"i": index, "logprob": scores.logprob, "greedy": scores.greedy}
        with self.path.open("a", encoding="utf-8") as file:
            # The break in front closes a line that a kill has cut off.
            file.write("\n" + json.dumps(row))


def _scores(row: Any, requests: Sequence[Request]) -> Scores | None:
    """The scores in a row, one for each target of its request; None if they are not that."""
    if not isinstance(row, dict) or type(row.get("i")) is not int:
        return None
    index, logprob, greedy = row["i"], row.get("logprob"), row.get("greedy")
    if not 0 <= index < len(requests) or not isinstance(logprob, list):
        return None
    count = len(requests[index].targets)
    if (
        not isinstance(greedy, list)
        or not len(logprob) == len(greedy) == count
        or not all(isinstance(p, float | int) and not math.isnan(p) for p in logprob)
        or not all(isinstance(g, bool) for g in greedy)
    ):
        return None
    return Scores(tuple(logprob), tuple(greedy))
