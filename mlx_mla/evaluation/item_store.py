"""Scores of single items on disk, so that an interrupted evaluation goes on where it stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mlx_mla.evaluation.scoring import Request, Scores


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
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the run ended
                found[row["i"]] = Scores(tuple(row["logprob"]), tuple(row["greedy"]))
        return found

    def add(self, index: int, scores: Scores) -> None:
        """Append the scores of a request."""
        assert self.path is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"i": index, "logprob": scores.logprob, "greedy": scores.greedy}
        with self.path.open("a", encoding="utf-8") as file:
            # The break in front closes a line that a kill has cut off.
            file.write("\n" + json.dumps(row))
