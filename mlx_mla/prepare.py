"""Turn text into token shards: `python -m mlx_mla.prepare SRC --out DIR` (docs/data.md)."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

from rich.console import Console
from tyro.conf import Positional

from mlx_mla import cli
from mlx_mla.data.blocks import Reading
from mlx_mla.data.documents import TextSource, find_sources
from mlx_mla.data.preparation import Preparation
from mlx_mla.data.shards import Format
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.display import PrepareDisplay, plain_console
from mlx_mla.errors import UserError
from mlx_mla.fields import OpenFraction, at_least_1, check_bounds
from mlx_mla.locks import locked
from mlx_mla.machine import cores
from mlx_mla.model.config import Seed

PROG = "python -m mlx_mla.prepare"


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
    val_fraction: OpenFraction = 0.01
    """Fraction of the documents to hold out for validation, selected by the hash of their text."""
    format: Format = "npy"
    """"npy" (build-nanogpt's format) or "llmc" (llm.c's .bin)."""
    # llm.c's header counts in int32.
    shard_tokens: Annotated[int, at_least_1(2**31 - 1)] = 100_000_000
    """Maximum tokens in a shard, unless a single block of text has more. A shard is shuffled in
    memory, at 2 bytes per token, or 4 if the tokenizer has more than 65,536 ids. Documents are
    never split."""
    workers: Optional[Annotated[int, at_least_1(1024)]] = None
    """Threads that read and tokenize. None: one per core. The result does not depend on it."""
    seed: Seed = 1337
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
    print(prepare(command, plain_console()))
    return 0


def prepare(command: PrepareCommand, console: Console) -> str:
    """Write the shards, or those that an interrupted preparation did not finish.

    Args:
        console: A `plain_console`, for progress.

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
    are_text = {isinstance(source, TextSource) for source in sources}
    if command.text_column != PrepareCommand.text_column and are_text == {True}:
        raise UserError(f"--text-column: {command.src} has plain text alone; leave it out")
    if command.separator != PrepareCommand.separator and are_text == {False}:
        raise UserError(f"--separator: {command.src} holds no plain text to split; leave it out")
    with locked(command.out, inside=True):
        job = Preparation(command, tokenizer, sources)
        if not job.manifest["complete"]:
            if others:
                console.print(f"skipped {len(others)} other files, such as {others[0]}")
            try:
                with PrepareDisplay(console, sum(source.size for source in sources)) as display:
                    job.run(workers, display)
            except KeyboardInterrupt:
                console.print(
                    f"stopped; the finished shards are in {command.out}; run the command again to "
                    "resume"
                )
                raise
        return job.summary()


def _check(command: PrepareCommand) -> int:
    check_bounds(command)
    if command.bpe_dir is not None and command.tokenizer != "gpt2":
        raise UserError("--bpe-dir requires --tokenizer gpt2; leave out --bpe-dir")
    if not command.separator:
        raise UserError("--separator must not be empty")
    return command.workers or cores()


if __name__ == "__main__":
    sys.exit(main())
