"""HellaSwag (Zellers et al. 2019), validation split: choose the right one of four endings.

standard: lm-evaluation-harness's `hellaswag`, on preprocessed text. `acc` chooses the ending with
the largest summed log-probability. `acc_norm` divides the sum by the ending's characters first. In
addition, the completion style of build-nanogpt on the raw context: `completion_acc` (sum) and
`completion_acc_norm` (mean per token).

original: the completion style only, as `acc` and `acc_norm`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, Scores
from mlx_mla.evaluation.tasks.base import Definition, Measured, Task, TaskSetup, accuracy
from mlx_mla.evaluation.tasks.data import load_hub, read_jsonl
from mlx_mla.fields import value_of


class HellaSwag(Task):
    """Documents are rows of the published schema, with an int as `label`."""

    name = "hellaswag"
    hub = "Rowan/hellaswag"
    files = {  # noqa: RUF012
        "standard": "hellaswag/hellaswag_val.jsonl",
        "original": "hellaswag/hellaswag_val.jsonl",
    }
    why_not_standard = (
        "hellaswag: raw context and endings, without the activity's name and without cleaning of "
        "WikiHow's brackets; endings are normalized by tokens, not characters"
    )

    def documents_from_file(self, path: Path, protocol: Definition) -> list[Any]:
        return _checked(list(read_jsonl(path)), str(path))

    def documents_from_hub(self, protocol: Definition) -> list[Any]:
        rows = load_hub(self.hub, None, "validation", self.files[protocol])
        return _checked(
            [(f"{self.hub}, row {i}", dict(row)) for i, row in enumerate(rows)], self.hub
        )

    def requests(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ) -> list[list[Request]]:
        requests = []
        for row in documents:
            head = tuple(setup.encode(row["ctx"], special=True)) or (setup.start,)
            completion = Request(head, tuple(tuple(setup.encode(" " + e)) for e in row["endings"]))
            if protocol == "original":
                requests.append([completion])
                continue
            query = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
            endings = [" " + clean(e) for e in row["endings"]]
            requests.append([setup.choices(query, endings), completion])
        return requests

    def measure(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup,
        requests: Sequence[Sequence[Request]], scores: Sequence[Sequence[Scores]],
    ) -> list[Measured]:  # fmt: skip
        labels = [row["label"] for row in documents]
        summed = [_best(own[-1], [1] * 4) for own in scores]
        by_token = [_best(s[-1], [len(t) for t in r[-1].targets]) for r, s in zip(requests, scores)]
        completion = "completion_" if protocol == "standard" else ""
        measured = [
            accuracy(f"{completion}acc", _equal(summed, labels)),
            accuracy(f"{completion}acc_norm", _equal(by_token, labels)),
        ]
        if protocol == "standard":
            by_character = [
                _best(s[0], [len(clean(e)) for e in d["endings"]])
                for d, s in zip(documents, scores)
            ]
            measured.insert(
                0, accuracy("acc", _equal([_best(own[0], [1] * 4) for own in scores], labels))
            )
            measured.insert(1, accuracy("acc_norm", _equal(by_character, labels)))
        return measured


def clean(text: str) -> str:
    """Preprocess text as lm-evaluation-harness does: replace WikiHow's [title] with a period, and
    remove other brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _best(scores: Scores, lengths: Sequence[int]) -> int:
    values = [s / max(1, n) for s, n in zip(scores.logprob, lengths)]
    return values.index(max(values))


def _equal(chosen: Sequence[int], labels: Sequence[int]) -> list[bool]:
    return [c == label for c, label in zip(chosen, labels)]


class _Example(TypedDict):
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: list[str]
    label: Any


def _checked(rows: list[tuple[str, dict[str, Any]]], source: str) -> list[dict[str, Any]]:
    if not rows:
        raise UserError(f"{source}: has no examples")
    for where, row in rows:
        value_of(_Example, row, where)
        if len(row["endings"]) != 4 or not all(e.strip() for e in row["endings"]):
            raise UserError(f"{where}: endings must be four texts")
        if str(row["label"]) not in ("0", "1", "2", "3"):
            raise UserError(f"{where}: label must be 0, 1, 2 or 3, not {row['label']!r}")
    return [{**row, "label": int(str(row["label"]))} for _, row in rows]
