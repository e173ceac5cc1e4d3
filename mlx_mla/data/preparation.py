"""From documents to shuffled token shards, in steps that a killed process can resume from."""

import collections
import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_mla.data.blocks import Source, TextBlock
from mlx_mla.data.manifest import MANIFEST, read_manifest
from mlx_mla.data.shards import SUFFIXES, Format, Split, open_listed, write_shard
from mlx_mla.data.tokenizer import Tokenizer, id_type
from mlx_mla.display import PrepareDisplay
from mlx_mla.errors import UserError, flag, shown
from mlx_mla.files import clear_leftovers, write_text
from mlx_mla.locks import LOCK
from mlx_mla.model.config import TOKENIZER_IDS

if TYPE_CHECKING:
    from mlx_mla.prepare import PrepareCommand

OPEN_FILES = 8
"""Number of files that are read in turn. It affects the order of documents, so it is not a
setting."""
BLOCK = 1 << 20
"""Bytes of text read in one turn. For the same reason it is not a setting."""


class _Documents:
    """Tokenized documents of the two splits, each after an `<|endoftext|>`."""

    def __init__(self) -> None:
        self.ids: dict[Split, list[np.ndarray]] = {"train": [], "val": []}
        self.tokens: dict[Split, int] = {"train": 0, "val": 0}
        self.empty = 0
        """Number of documents that were left out because they are empty."""
        self.bytes = 0
        """Size of the documents' text in UTF-8."""

    def add(self, other: "_Documents") -> None:
        for split, ids in other.ids.items():
            self.ids[split] += ids
            self.tokens[split] += other.tokens[split]
        self.empty += other.empty
        self.bytes += other.bytes


def _encode(block: TextBlock, tokenizer: Tokenizer, val_fraction: float) -> _Documents:
    found = _Documents()
    start = np.array([tokenizer.end_of_text], id_type(tokenizer.size))
    for text in block.documents():
        if text is None or not text.strip():
            found.empty += 1
            continue
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, which JSON can express
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            data = text.encode("utf-8")
        found.bytes += len(data)
        held_out = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < val_fraction * 2**64
        split: Split = "val" if held_out else "train"
        ids = np.concatenate([start, tokenizer.encode(text)])
        found.ids[split].append(ids)
        found.tokens[split] += len(ids)
    return found


class Preparation:
    """A preparation. Its manifest on disk records what is done and where to resume."""

    def __init__(self, command: "PrepareCommand", tokenizer: Tokenizer, sources: list[Source]):
        self.command, self.tokenizer, self.sources = command, tokenizer, sources
        self.out = command.out
        self.manifest = self._claim()
        self._held = _Documents()  # to be shuffled and written

    def run(self, workers: int, display: PrepareDisplay) -> None:
        """Read, tokenize, shuffle and write until everything is done."""
        command, start = self.command, self.manifest["next"]
        order = np.random.default_rng([command.seed]).permutation(len(self.sources))
        opened = {file for file, _ in start["open"]}
        for file in set(range(start["file"])) - opened:
            display.read(self.sources[order[file]].name, self.sources[order[file]].size)
        pool = ThreadPoolExecutor(workers)
        try:
            stream = _blocks(self.sources, order, start, min(BLOCK, command.shard_tokens), pool)
            for turn, new in self._encoded(stream, pool, 4 * workers):
                held = self._held
                size = max(held.tokens[split] + new.tokens[split] for split in held.tokens)
                if any(held.tokens.values()) and size > command.shard_tokens:
                    self._commit(turn.state)
                self._held.add(new)
                display.read(turn.source.name, turn.block.done)
                display.tokens(new.bytes, sum(new.tokens.values()))
            self._commit({"open": [], "file": len(self.sources)})
        finally:
            pool.shutdown(cancel_futures=True)
        self._finish()

    def summary(self) -> str:
        m = self.manifest

        def total(split: str, unit: str) -> str:
            return f"{sum(s[unit] for s in m['shards'] if s['split'] == split):,} {unit}"

        flags = ["--data", str(self.out), "--tokenizer", self.command.tokenizer]
        if self.command.bpe_dir is not None:
            flags += ["--bpe-dir", self.command.bpe_dir]
        held_out = f"{total('val', 'tokens')}, {total('val', 'documents')}"
        if all(s["split"] == "train" for s in m["shards"]):
            held_out = "no documents; training holds out the last tokens instead"
        return (
            f"training    {total('train', 'tokens')}, {total('train', 'documents')}\n"
            f"validation  {held_out}\n"
            f"skipped     {m['empty_documents']:,} empty documents\n"
            f"folder      {self.out}  ({len(m['shards'])} shards, {MANIFEST})\n"
            f"train with:\n  python -m mlx_mla.train {shlex.join(flags)}"
        )

    def _encoded(
        self, stream: Iterator["_Turn"], pool: ThreadPoolExecutor, ahead: int
    ) -> Iterator[tuple["_Turn", _Documents]]:
        """Tokenize up to `ahead` blocks at once, and yield them in order."""
        encode = partial(_encode, tokenizer=self.tokenizer, val_fraction=self.command.val_fraction)
        running: collections.deque[tuple[_Turn, Future[_Documents]]] = collections.deque()
        while True:
            for turn in itertools.islice(stream, ahead - len(running)):
                running.append((turn, pool.submit(encode, turn.block)))
            if not running:
                return
            turn, future = running.popleft()
            yield turn, future.result()

    def _commit(self, state: dict[str, Any]) -> None:
        """Write the documents that are held, then the manifest that lists them.

        If the process is killed in between, the old manifest is still correct.
        """
        m, command, held = self.manifest, self.command, self._held
        number = len([s for s in m["shards"] if s["split"] == "train"]) + 1
        if held.ids["train"]:
            name = f"tokens_train_{number:06d}{SUFFIXES[command.format]}"
            pieces = _shuffled(held.ids["train"], [command.seed, number, 0])
            counts = held.tokens["train"], len(held.ids["train"])
            m["shards"].append(self._write_shard(name, command.format, "train", pieces, *counts))
        if held.ids["val"]:  # few documents, so they are merged into shards at the end
            name = f".val_{len(m['parts']):06d}.npy"
            pieces = _shuffled(held.ids["val"], [command.seed, number, 1])
            counts = held.tokens["val"], len(held.ids["val"])
            m["parts"].append(self._write_shard(name, "npy", "val", pieces, *counts))
        m["empty_documents"] += held.empty
        m["next"] = state
        self._write()
        self._held = _Documents()

    def _write_shard(
        self, name: str, layout: Format, split: Split, pieces: Iterator[np.ndarray],
        tokens: int, documents: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Write a shard; returns its entry in the manifest."""
        dtype = id_type(self.tokenizer.size)
        digest = write_shard(self.out / name, layout, pieces, tokens, dtype)
        about = {"file": name, "split": split, "tokens": tokens, "documents": documents}
        return {**about, "sha256": digest}

    def _finish(self) -> None:
        m, command = self.manifest, self.command
        if not m["shards"] and not m["parts"]:
            raise UserError(
                f"{command.src}: all of its {m['empty_documents']:,} documents are empty; give "
                "other text"
            )
        if not m["shards"]:
            raise UserError(
                f"{command.src}: all documents were selected for validation; give a new --out and "
                "a smaller --val-fraction"
            )
        groups: list[list[dict[str, Any]]] = []
        for part in m["parts"]:
            if not groups or sum(p["tokens"] for p in [*groups[-1], part]) > command.shard_tokens:
                groups.append([])
            groups[-1].append(part)
        rows = [self._merge(group, number) for number, group in enumerate(groups)]
        m["shards"] = rows + m["shards"]
        m["complete"] = True
        del m["parts"], m["next"]
        self._write()
        self._remove_parts()

    def _remove_parts(self) -> None:
        for path in self.out.glob(".val_*.npy"):
            path.unlink(missing_ok=True)

    def _merge(self, parts: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
        name = f"tokens_val_{number:06d}{SUFFIXES[self.command.format]}"
        pieces = (open_listed(self.out, part).tokens for part in parts)  # one open at a time
        counts = (sum(part[unit] for part in parts) for unit in ("tokens", "documents"))
        return self._write_shard(name, self.command.format, "val", pieces, *counts)

    def _claim(self) -> dict[str, Any]:
        """Return the manifest in --out, or create one; UserError if --out holds anything else."""
        command, out = self.command, self.out
        settings = {name: getattr(command, name) for name in _SETTINGS}
        identity = self.tokenizer.identity
        new: dict[str, Any] = {
            "format": 1,
            "complete": False,
            "settings": settings,
            "tokenizer": {
                "name": self.tokenizer.name,
                "ids": self.tokenizer.size,
                "end_of_text": self.tokenizer.end_of_text,
                **({} if self.tokenizer.name in TOKENIZER_IDS else {"identity": identity}),
            },
            "sources": [[source.name, source.size] for source in self.sources],
            "empty_documents": 0,
            "shards": [],
            "parts": [],
            "next": {"open": [], "file": 0},
        }
        clear_leftovers(out, MANIFEST, *(f"*{suffix}" for suffix in SUFFIXES.values()))
        old = read_manifest(out, to_resume=True) if (out / MANIFEST).is_file() else None
        if old is not None and (old["shards"] or old.get("parts")):
            for name, value in settings.items():
                before = old["settings"].get(name)
                if before != value:
                    raise UserError(
                        f"{out}: holds another preparation, with {flag(name)} {before} instead of "
                        f"{value}; give --out a new name"
                    )
            if old["tokenizer"].get("identity") != new["tokenizer"].get("identity"):
                raise UserError(
                    f"{out}: was prepared with another tokenizer of the name {command.tokenizer}; "
                    "give --out a new name"
                )
            if old["sources"] != new["sources"]:
                both = (old["sources"], new["sources"])
                changed = next((s for a, b in (both, both[::-1]) for s in b if s not in a), None)
                how = f"{shown(changed[0])} differs" if changed else "in another order"
                raise UserError(
                    f"{out}: was prepared from other files ({how}); give --out a new name"
                )
            for row in old["shards"] + old.get("parts", []):
                open_listed(out, row)
            if old["complete"]:
                self._remove_parts()
            return old
        if old is None and any(path.name != LOCK for path in out.iterdir()):
            raise UserError(f"{out}: is not an empty folder; give --out a new name")
        self.manifest = new
        self._write()
        return new

    def _write(self) -> None:
        write_text(self.out / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")


# The settings that affect the shards.
_SETTINGS = (
    *("tokenizer", "val_fraction", "format", "shard_tokens", "seed", "text_column"),
    "separator",
)


def _shuffled(documents: Sequence[np.ndarray], seed: Sequence[int]) -> Iterator[np.ndarray]:
    return (documents[i] for i in np.random.default_rng(seed).permutation(len(documents)))


class _Turn(NamedTuple):
    state: dict[str, Any]
    """Where to resume in order to read this block."""
    source: Source
    block: TextBlock


def _blocks(
    sources: Sequence[Source],
    order: np.ndarray,
    state: dict[str, Any],
    limit: int,
    pool: ThreadPoolExecutor,
) -> Iterator[_Turn]:
    """Yield blocks from OPEN_FILES files in turn, each with the state before it.

    Every file is read ahead by one block. A state lists the open files in the order of their turns,
    the position of each, and the next file to open.
    """

    @dataclasses.dataclass
    class Open:
        file: int
        position: Any
        blocks: Iterator[TextBlock]
        following: Future[TextBlock | None]

    def start(file: int, position: Any) -> Open:
        blocks = sources[order[file]].blocks(position, limit)
        return Open(file, position, blocks, pool.submit(next, blocks, None))

    opened = collections.deque(start(file, position) for file, position in state["open"])
    following = state["file"]
    while True:
        while len(opened) < OPEN_FILES and following < len(sources):
            opened.append(start(following, None))
            following += 1
        if not opened:
            return
        state = {"open": [[o.file, o.position] for o in opened], "file": following}
        first = opened.popleft()
        block = first.following.result()
        if block is None:
            continue
        first.position, first.following = block.end, pool.submit(next, first.blocks, None)
        opened.append(first)
        yield _Turn(state, sources[order[first.file]], block)
