"""LAMBADA (Paperno et al. 2016, OpenAI's formatting): predict the last word of a passage.

standard: lm-evaluation-harness's `lambada_openai`, which scores all tokens of the last word. `acc`
counts the passages in which each of them is the most likely token. `ppl` is exp of the mean
negative log-probability of the word.

original: only the last BPE token is scored.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, Scores
from mlx_mla.evaluation.tasks.base import Definition, Measured, Task, TaskSetup, accuracy
from mlx_mla.evaluation.tasks.data import load_hub, read_jsonl
from mlx_mla.fields import value_of


class Lambada(Task):
    """Documents are the passages."""

    name = "lambada"
    hub = "EleutherAI/lambada_openai"
    files = {"standard": "lambada/lambada_test.jsonl", "original": "lambada/lambada_test.jsonl"}  # noqa: RUF012
    why_not_standard = (
        "lambada: only the last BPE token is predicted, given the preceding tokens of its word"
    )

    def documents_from_file(self, path: Path, protocol: Definition) -> list[Any]:
        return _checked(list(read_jsonl(path)), str(path))

    def documents_from_hub(self, protocol: Definition) -> list[Any]:
        rows = load_hub(self.hub, "default", "test", self.files[protocol])
        return _checked(
            [(f"{self.hub}, row {i}", {"text": text}) for i, text in enumerate(rows["text"])],
            self.hub,
        )

    def requests(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ) -> list[list[Request]]:
        requests = []
        for text in documents:
            if protocol == "standard":
                before, _, word = text.rpartition(" ")
                requests.append([setup.choices(before, [" " + word])])
            else:
                ids = setup.encode(text)
                requests.append([Request(tuple(ids[:-1]), ((ids[-1],),))] if len(ids) > 1 else [])
        return requests

    def measure(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup,
        requests: Sequence[Sequence[Request]], scores: Sequence[Sequence[Scores]],
    ) -> list[Measured]:  # fmt: skip
        flat = [s for own in scores for s in own]
        nll = np.array([-s.logprob[0] for s in flat])
        return [
            Measured(
                "ppl", nll, np.ones(len(flat)), True, "word" if protocol == "standard" else "token"
            ),
            accuracy("acc", [s.greedy[0] for s in flat]),
        ]


class _Passage(TypedDict):
    text: str


def _checked(rows: list[tuple[str, dict[str, Any]]], source: str) -> list[str]:
    if not rows:
        raise UserError(f"{source}: has no passages")
    texts = []
    for where, row in rows:
        text = value_of(_Passage, row, where)["text"]
        if " " not in text.strip() or text != text.rstrip():
            raise UserError(f"{where}: text must be several words without a blank at the end")
        texts.append(text)
    return texts
