"""WikiText-2 (Merity et al. 2016, raw): perplexity.

standard: `token_ppl` joins the rows of the test split with blank lines and scores the text in
disjoint windows of 1024 tokens. `token_ppl_stride512` uses windows that start 512 tokens apart and
scores only the tokens that the previous window did not score (Hugging Face's "Perplexity of
fixed-length models"). `word_ppl`, `byte_ppl` and `bits_per_byte` are lm-evaluation-harness's
`wikitext`: each page is detokenized and scored in disjoint windows, the first of which follows
<|endoftext|>. Its loss is divided by the words and bytes of the original page.

original: every row of the validation split that is not blank is scored on its own, without its
first and last token.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla.errors import UserError
from mlx_mla.evaluation.scoring import Request, Scores
from mlx_mla.evaluation.tasks.base import Definition, Measured, Task, TaskSetup
from mlx_mla.evaluation.tasks.data import load_hub
from mlx_mla.files import read_text

WINDOW = 1024
"""Tokens in a window for published values of `token_ppl`."""

# Spaces that WikiText's tokenizer inserted, removed in this order.
_PLAIN = [
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
]  # fmt: skip
_PAIRS = [
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
]
_REST = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


class WikiText2(Task):
    """Documents are pairs: `("text", str)` and `("page", str)` in the standard protocol, and
    `("row", str)` in the original one."""

    name = "wikitext2"
    files = {"standard": "wikitext2/wiki.test.raw", "original": "wikitext2/wiki.valid.raw"}  # noqa: RUF012
    why_not_standard = (
        "wikitext2: the validation split instead of the test split, scored row by row, so most "
        "tokens have far less context than in a window of 1024; the first and last token of a row "
        "are not scored"
    )

    def documents_from_file(self, path: Path, protocol: Definition) -> list[Any]:
        text = read_text(path)
        if not text.strip():
            raise UserError(f"{path}: is empty")
        # A row is a line with its line break; in the published dataset, blank rows are empty.
        lines = text.removesuffix("\n").split("\n")
        return self._documents([line + "\n" if line.strip() else "" for line in lines], protocol)

    def documents_from_hub(self, protocol: Definition) -> list[Any]:
        split = {"standard": "test", "original": "validation"}[protocol]
        rows = load_hub("wikitext", "wikitext-2-raw-v1", split, self.files[protocol])
        return self._documents(list(rows["text"]), protocol)

    def _documents(self, rows: list[str], protocol: Definition) -> list[Any]:
        if protocol == "original":
            return [("row", row) for row in rows if row.strip()]
        return [("text", "\n\n".join(rows)), *(("page", page) for page in pages(rows))]

    def requests(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup
    ) -> list[list[Request]]:
        if protocol == "standard" and setup.window > setup.n_positions:
            raise UserError(
                f"wikitext2: windows of {setup.window} tokens do not fit this model's "
                f"n_positions={setup.n_positions}; --window {setup.n_positions} measures a "
                "different perplexity, which is not comparable"
            )
        return [self._requests(part, text, setup) for part, text in documents]

    def sample(
        self, documents: Sequence[Any], limit: int, random: np.random.Generator
    ) -> list[Any]:
        """Sample pages or rows; `requests` samples as many windows from the whole text."""
        whole = [d for d in documents if d[0] == "text"]
        return whole + super().sample([d for d in documents if d[0] != "text"], limit, random)

    def _requests(self, part: str, text: str, setup: TaskSetup) -> list[Request]:
        window = setup.window
        if part == "text":
            ids = setup.encode(text)
            return [*_windows(ids, window, setup), *_windows(ids, window // 2, setup)]
        if part == "page":
            ids = setup.encode(detokenize(text))
            requests = []
            for start in range(0, len(ids), setup.n_positions):
                end = min(start + setup.n_positions, len(ids))
                # The last window reaches back, so its tokens also have as much context as fits.
                before = ids[end - setup.n_positions - 1 : start] if start else [setup.start]
                requests.append(Request(tuple(before), (tuple(ids[start:end]),)))
            return requests
        ids = setup.encode(text)
        requests = []
        for start in range(0, len(ids) - 1, setup.n_positions):
            end = min(start + setup.n_positions, len(ids) - 1)
            if end - start > 1:
                requests.append(Request((ids[start],), (tuple(ids[start + 1 : end]),)))
        return requests

    def measure(
        self, documents: Sequence[Any], protocol: Definition, setup: TaskSetup,
        requests: Sequence[Sequence[Request]], scores: Sequence[Sequence[Scores]],
    ) -> list[Measured]:  # fmt: skip
        measured = []
        nll = [np.array([-s.logprob[0] for s in own]) for own in scores]
        tokens = [np.array([float(len(r.targets[0])) for r in own]) for own in requests]
        if protocol == "original":
            keep = [i for i, t in enumerate(tokens) if len(t)]
            sums = np.array([nll[i].sum() for i in keep]), np.array([tokens[i].sum() for i in keep])
            return [Measured("token_ppl", *sums, perplexity=True, unit="token")]
        for i, (part, text) in enumerate(documents):
            if part == "text":
                n = len(_windows(setup.encode(text), setup.window, setup))
                windows = {
                    "token_ppl": slice(None, n),
                    f"token_ppl_stride{setup.window // 2}": slice(n, None),
                }
                for name, own in windows.items():
                    measured.append(Measured(name, nll[i][own], tokens[i][own], True, "token"))
        # The harness counts words by splitting, which counts the blank before the title as one.
        on_pages = [
            (text, nll[i].sum()) for i, (part, text) in enumerate(documents) if part == "page"
        ]
        if on_pages:
            losses = np.array([loss for _, loss in on_pages])
            words = np.array([float(len(re.split(r"\s+", page))) for page, _ in on_pages])
            size = np.array([float(len(page.encode("utf-8"))) for page, _ in on_pages])
            measured.append(Measured("word_ppl", losses, words, True, "word"))
            measured.append(Measured("byte_ppl", losses, size, True, "byte"))
            measured.append(Measured("bits_per_byte", losses / math.log(2), size, False, "byte"))
        return measured


def pages(rows: Sequence[str]) -> list[str]:
    """Split rows into articles. An article begins at each first-level heading ` = Title = `."""
    articles: list[list[str]] = [[]]
    for row in rows:
        line = row.strip()
        title = line.replace("= = =", "===").replace("= =", "==")
        if title.startswith("= ") and title.endswith(" ="):
            articles.append([])
        articles[-1].append(row.removesuffix("\n") if row else " ")
    joined = ["\n".join(lines) for lines in articles]
    return [page for page in joined if page.strip()]


def detokenize(page: str) -> str:
    """Undo WikiText's tokenization, by the rules of lm-evaluation-harness (wikitext 2.0)."""
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for old, new in _PLAIN:
        text = text.replace(old, new)
    for pattern, replacement in _PAIRS:
        text = re.sub(pattern, replacement, text)
    for old, new in _REST:
        text = text.replace(old, new)
    return text


def _windows(ids: Sequence[int], stride: int, setup: TaskSetup) -> list[Request]:
    windows = _sliding(ids, setup.window, stride)
    if setup.limit is None or setup.limit >= len(windows):
        return windows
    chosen = np.random.default_rng(setup.seed).choice(len(windows), setup.limit, replace=False)
    return [windows[i] for i in sorted(chosen)]


def _sliding(ids: Sequence[int], window: int, stride: int) -> list[Request]:
    """Windows `stride` apart; each scores the tokens that the previous one did not reach."""
    requests = []
    reached = 0
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        first = max(reached, start + 1)  # the first token of a window has no context
        if first < end:
            requests.append(Request(tuple(ids[start:first]), (tuple(ids[first:end]),)))
        reached = end
        if end == len(ids):
            break
    return requests
