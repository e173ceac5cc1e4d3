"""Per-item scores on disk, from which an interrupted evaluation resumes."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, Scores
from mlx_mla.fields import Bounds, Count, value_of
from mlx_mla.files import REMEDY, parse_json

_LogProb = Annotated[float, Bounds("", -math.inf, 0.01)]  # 0, and a little for rounding


@dataclasses.dataclass(frozen=True)
class _Item:
    i: Count
    logprob: list[_LogProb]
    greedy: list[bool]


class ItemStore:
    """A file of JSON lines `{"i", "logprob", "greedy"}` for one model and task.

    Args:
        folder: Folder of the files. It is created when the first item is added.
        settings: Everything besides the requests that affects the scores. Each combination has its
            own file.
    """

    def __init__(self, folder: Path, settings: Sequence[str]):
        self.folder, self.settings = folder, list(settings)
        self.path: Path | None = None

    def read(self, requests: Sequence[Request]) -> dict[int, Scores]:
        """Return the stored scores of exactly these requests, by index. Call it before `add`.

        A line that a killed process left unfinished is skipped.

        Raises:
            UserError: If a line holds anything else; the message names the line.
        """
        key = hashlib.sha256(json.dumps(self.settings).encode())
        for request in requests:
            key.update(repr((request.context, request.targets)).encode())
        self.path = self.folder / f"{self.settings[-2]}-{key.hexdigest()[:16]}.jsonl"
        found = {}
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            where = f"{self.path}, line {number}"
            try:
                values = parse_json(line, where)
            except UserError:
                continue
            item: _Item = value_of(_Item, values, where, REMEDY)
            count = len(requests[item.i].targets) if item.i < len(requests) else None
            if not len(item.logprob) == len(item.greedy) == count:
                raise UserError(f"{where}: does not match the request of item {item.i}; {REMEDY}")
            found[item.i] = Scores(tuple(item.logprob), tuple(item.greedy))
        return found

    def add(self, index: int, scores: Scores) -> None:
        """Append the scores of a request."""
        assert self.path is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"i": index, "logprob": scores.logprob, "greedy": scores.greedy}
        with self.path.open("a", encoding="utf-8") as file:
            # The leading line break ends a line that a killed process left unfinished.
            file.write("\n" + json.dumps(row))
