"""Turn text into token shards: `python -m mlx_mla.prepare SRC --out DIR` (docs/data.md)."""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
from rich.console import Console
from tyro.conf import Positional

from mlx_mla import cli
from mlx_mla.data.documents import Reading, Source, TextBlock, find_sources
from mlx_mla.data.manifest import MANIFEST, read_manifest
from mlx_mla.data.shards import SUFFIXES, Format, open_listed, write_shard
from mlx_mla.data.tokenizer import Tokenizer, get_tokenizer, id_type
from mlx_mla.display import PrepareDisplay, plain_console
from mlx_mla.errors import UserError, flag, shown
from mlx_mla.fields import at_least_1, check_bounds, not_negative
from mlx_mla.files import clear_leftovers, write_text
from mlx_mla.locks import LOCK, locked
from mlx_mla.model.config import MAX_SEED, TOKENIZER_IDS

PROG = "python -m mlx_mla.prepare"

OPEN_FILES = 8
"""Number of files that are read in turn. It affects the order of documents, so it is not a
setting."""
BLOCK = 1 << 20
"""Bytes of text read in one turn. For the same reason it is not a setting."""


@dataclasses.dataclass(kw_only=True)
class PrepareCommand:
    """Turn text into shuffled token shards for mlx_mla.train --data DIR.

    After an interruption, run it again with the same arguments to resume where it stopped.
    """

    src: Positional[str]
    """A text file, a folder (searched recursively) of .txt, .jsonl (also .gz, .xz, .zst) and
    .parquet files, or a dataset on the Hugging Face hub with its config, such as
    HuggingFaceFW/fineweb-edu:sample-10BT."""
    out: Path
    """Folder for the shards."""
    tokenizer: str = "gpt2"
    """"gpt2" (GPT-2's byte-pair encoding, 50257 ids), "bytes" (256 bytes and <|endoftext|>), or a
    folder with a tokenizer.json, such as a model folder."""
    bpe_dir: Optional[str] = None
    """Folder with encoder.json and vocab.bpe for --tokenizer gpt2. None: tiktoken downloads them
    once."""
    val_fraction: float = 0.01
    """Fraction of the documents to hold out for validation, selected by the hash of their text."""
    format: Format = "npy"
    """"npy" (build-nanogpt's format) or "llmc" (llm.c's .bin)."""
    prefix: str = "tokens"
    """Beginning of the shards' names: PREFIX_train_000001.npy."""
    shard_tokens: int = 100_000_000
    """Maximum tokens in a shard. A shard is shuffled in memory, at 2 bytes per token, or 4 if the
    tokenizer has more than 65,536 ids. Documents are never split."""
    workers: Optional[int] = None
    """Threads that read and tokenize. None: one per core. The result does not depend on it."""
    seed: int = 1337
    """Determines the order of files and documents."""
    text_column: str = "text"
    """Column (or key of a JSON line) that holds the text."""
    separator: str = "<|endoftext|>"
    """Separator between the documents of a plain text file."""
    revision: Optional[str] = None
    """Commit, branch or tag of a dataset on the hub. None: the newest commit, which the manifest
    records."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv, needs_reader=False)


def _main(argv: Sequence[str]) -> int:
    command = cli.parse(PrepareCommand, argv, PROG)
    summary = prepare(command, plain_console())
    print(summary)
    return 0


def prepare(command: PrepareCommand, console: Console) -> str:
    """Write the shards, or those that an interrupted preparation did not finish.

    Returns:
        A summary of the folder, in a few lines.

    Raises:
        UserError: For any mistake in the input. Finished shards are kept for the next attempt.
    """
    workers = _check(command)
    tokenizer = get_tokenizer(command.tokenizer, command.bpe_dir)
    sources, others = find_sources(
        command.src, Reading(command.text_column, command.separator, command.revision)
    )
    _make(command.out)
    with locked(command.out, inside=True):
        job = _Job(command, tokenizer, sources)
        if not job.manifest["complete"]:
            if others:
                console.print(
                    f"skipped {len(others)} other files, such as {others[0]}",
                    markup=False,
                    highlight=False,
                )
            try:
                with PrepareDisplay(console, sum(source.size for source in sources)) as display:
                    job.run(workers, display)
            except KeyboardInterrupt:
                console.print(
                    f"stopped; the finished shards are in {command.out}; run the command again to "
                    "resume",
                    markup=False,
                )
                raise
        return job.summary()


def _make(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is not an empty folder; give --out a new name")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be created: {e.strerror}; give --out another path") from e


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A block as token ids, each document after an `<|endoftext|>`, as (training, validation)."""

    tokens: tuple[np.ndarray, np.ndarray]
    lengths: tuple[list[int], list[int]]
    empty: int
    bytes: int


def _encode(block: TextBlock, tokenizer: Tokenizer, val_fraction: float) -> _Encoded:
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    lengths: tuple[list[int], list[int]] = ([], [])
    start = np.array([tokenizer.end_of_text], id_type(tokenizer.size))
    empty = size = 0
    for text in block.documents():
        if text is None or not text.strip():
            empty += 1
            continue
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, which JSON can express
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            data = text.encode("utf-8")
        size += len(data)
        held_out = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < val_fraction * 2**64
        ids = tokenizer.encode(text)
        parts[held_out].extend((start, ids))
        lengths[held_out].append(len(ids) + 1)
    train, val = (np.concatenate(p) if p else start[:0] for p in parts)
    return _Encoded((train, val), lengths, empty, size)


class _Gathered:
    """Documents of one split that are still to be shuffled and written."""

    def __init__(self) -> None:
        self.count = 0
        self._documents: list[np.ndarray] = []

    def add(self, tokens: np.ndarray, lengths: Sequence[int]) -> None:
        self.count += len(tokens)
        self._documents += np.split(tokens, np.cumsum(lengths)[:-1]) if lengths else []

    def __len__(self) -> int:
        return len(self._documents)

    def shuffled(self, seed: Sequence[int]) -> Iterator[np.ndarray]:
        return (
            self._documents[i]
            for i in np.random.default_rng(seed).permutation(len(self._documents))
        )


class _Job:
    """A preparation. Its manifest on disk records what is done and where to resume."""

    def __init__(self, command: PrepareCommand, tokenizer: Tokenizer, sources: list[Source]):
        self.command, self.tokenizer, self.sources, self.out = (
            command,
            tokenizer,
            sources,
            command.out,
        )
        self.manifest = self._claim()
        self._train, self._val = _Gathered(), _Gathered()
        self._empty = 0

    def run(self, workers: int, display: PrepareDisplay) -> None:
        """Read, tokenize, shuffle and write until everything is done."""
        command, start = self.command, self.manifest["next"]
        order = np.random.default_rng([command.seed]).permutation(len(self.sources))
        opened = {file for file, _ in start["open"]}
        done = sum(
            self.sources[order[file]].size for file in range(start["file"]) if file not in opened
        )
        display.resume(done, {self.sources[order[file]].name for file in opened})
        pool = ThreadPoolExecutor(workers)
        try:
            stream = _blocks(self.sources, order, start, min(BLOCK, command.shard_tokens), pool)
            for state, encoded in self._encoded(stream, pool, 4 * workers, display):
                sizes = [len(tokens) for tokens in encoded.tokens]
                waiting = len(self._train) + len(self._val)
                if (
                    waiting
                    and max(self._train.count + sizes[0], self._val.count + sizes[1])
                    > command.shard_tokens
                ):
                    self._commit(state)
                self._train.add(encoded.tokens[0], encoded.lengths[0])
                self._val.add(encoded.tokens[1], encoded.lengths[1])
                self._empty += encoded.empty
                display.tokens(encoded.bytes, sum(sizes))
            self._commit({"open": [], "file": len(self.sources)})
        finally:
            pool.shutdown(cancel_futures=True)
        self._finish()

    def summary(self) -> str:
        m = self.manifest
        documents = {
            split: sum(s["documents"] for s in m["shards"] if s["split"] == split)
            for split in _SPLITS
        }
        tokens = {
            split: sum(s["tokens"] for s in m["shards"] if s["split"] == split) for split in _SPLITS
        }
        return (
            f"training    {tokens['train']:,} tokens, {documents['train']:,} documents\n"
            f"validation  {tokens['val']:,} tokens, {documents['val']:,} documents\n"
            f"skipped     {m['empty_documents']:,} empty documents\n"
            f"folder      {self.out}  ({len(m['shards'])} shards, {MANIFEST})\n"
            f"train with:\n  python -m mlx_mla.train --data {shlex.quote(str(self.out))} "
            f"--tokenizer {shlex.quote(self.command.tokenizer)}"
        )

    def _encoded(
        self,
        stream: Iterator["_Turn"],
        pool: ThreadPoolExecutor,
        ahead: int,
        display: PrepareDisplay,
    ) -> Iterator[tuple[dict[str, Any], _Encoded]]:
        """Tokenize up to `ahead` blocks at once, and yield them in order, each with the state
        before it."""
        running: collections.deque[tuple[_Turn, Future[_Encoded]]] = collections.deque()
        while True:
            for turn in itertools.islice(stream, ahead - len(running)):
                running.append(
                    (
                        turn,
                        pool.submit(_encode, turn.block, self.tokenizer, self.command.val_fraction),
                    )
                )
            if not running:
                return
            turn, future = running.popleft()
            encoded = future.result()
            display.read(turn.source.name, turn.block.done)
            yield turn.state, encoded

    def _commit(self, state: dict[str, Any]) -> None:
        """Write the gathered documents, then the manifest that lists them.

        If the process is killed in between, the old manifest is still correct.
        """
        m, command = self.manifest, self.command
        number = len([s for s in m["shards"] if s["split"] == "train"]) + 1
        if len(self._train):
            name = f"{command.prefix}_train_{number:06d}{SUFFIXES[command.format]}"
            m["shards"].append(
                self._write_shard(
                    name, command.format, "train", self._train, [command.seed, number, 0]
                )
            )
        if len(self._val):  # few documents, so they are merged into shards at the end
            name = f".val_{len(m['parts']):06d}.npy"
            m["parts"].append(
                self._write_shard(name, "npy", "val", self._val, [command.seed, number, 1])
            )
        m["empty_documents"] += self._empty
        m["next"] = state
        self._write()
        self._train, self._val, self._empty = _Gathered(), _Gathered(), 0

    def _write_shard(
        self, name: str, layout: Format, split: str, gathered: _Gathered, seed: Sequence[int]
    ) -> dict[str, Any]:
        kind = id_type(self.tokenizer.size)
        pieces = gathered.shuffled(seed)
        digest = write_shard(self.out / name, layout, pieces, gathered.count, kind)
        return _row(name, split, gathered.count, len(gathered), digest)

    def _finish(self) -> None:
        m, command = self.manifest, self.command
        if not m["shards"] and not m["parts"]:
            raise UserError(
                f"{command.src}: all of its {m['empty_documents']:,} documents are empty; give "
                "other text"
            )
        if not m["parts"]:
            raise UserError(
                f"{command.src}: none of its {sum(s['documents'] for s in m['shards'])} documents "
                "were selected for validation; give a new --out and a larger --val-fraction, or a "
                "--separator that splits the text into more documents"
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
        name = f"{self.command.prefix}_val_{number:06d}{SUFFIXES[self.command.format]}"
        count = sum(part["tokens"] for part in parts)
        pieces = (open_listed(self.out, part).tokens for part in parts)
        kind = id_type(self.tokenizer.size)
        digest = write_shard(self.out / name, self.command.format, pieces, count, kind)
        documents = sum(part["documents"] for part in parts)
        return _row(name, "val", count, documents, digest)

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


_SPLITS = ("train", "val")
# The settings that affect the shards.
_SETTINGS = (
    "tokenizer",
    "val_fraction",
    "format",
    "prefix",
    "shard_tokens",
    "seed",
    "text_column",
    "separator",
)


def _row(name: str, split: str, tokens: int, documents: int, sha256: str) -> dict[str, Any]:
    """The manifest's entry for a shard."""
    return {
        "file": name,
        "split": split,
        "tokens": tokens,
        "documents": documents,
        "sha256": sha256,
    }


_BOUNDS = {
    "shard_tokens": at_least_1(2**31 - 1),  # llm.c's header counts in int32
    "workers": at_least_1(1024),
    "seed": not_negative(MAX_SEED),
}


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


def _check(command: PrepareCommand) -> int:
    if not 0 < command.val_fraction < 1:
        raise UserError(f"--val-fraction must be between 0 and 1, not {command.val_fraction}")
    check_bounds(command, _BOUNDS)
    if command.bpe_dir is not None and command.tokenizer != "gpt2":
        raise UserError("--bpe-dir requires --tokenizer gpt2; leave out --bpe-dir")
    if not command.separator:
        raise UserError("--separator must not be empty")
    if not re.fullmatch(r"[\w.-]+", command.prefix) or re.search("train|val", command.prefix):
        raise UserError(
            f"--prefix {command.prefix!r} must consist of letters, digits, '.', '_' and '-', and "
            "must not contain 'train' or 'val'"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return command.workers or cores or 1


if __name__ == "__main__":
    sys.exit(main())
