"""Measure mlx_mla.prepare: text per second against tiktoken alone, and memory at two sizes of
input.

    python -m bench.prepare SRC --bpe-dir DIR [--megabytes 60] [--out bench/results]

tiktoken's `encode_ordinary_batch` gets the documents as strings in memory, and as many threads as
there are cores. `prepare` reads the same documents from JSON lines, plain and compressed, and does
all else until the shards are on disk. They take turns. Each is measured on the documents as they
are and cut into pieces of the size of a web page, which take more of Python's time. Decompressing
is also timed alone, on one core. Memory is the peak of a process of its own. Prints a table; writes
NAME.json and NAME.md.
"""

import dataclasses
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

from rich.console import Console
from tyro.conf import Positional

from bench.harness import Document, Report, Row, document, publish
from mlx_mla import cli, prepare
from mlx_mla.data.documents import Reading, find_sources
from mlx_mla.data.tokenizer import GPT2Tokenizer
from mlx_mla.errors import UserError

PROG = "python -m bench.prepare"
ALONE, PLAIN, XZ, UNPACK = (
    "tiktoken alone",
    "prepare, .jsonl",
    "prepare, .jsonl.xz",
    "xz alone, one core",
)
FILES = 8
VAL_FRACTION = 0.2  # large, so that few whole books leave none out
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(kw_only=True)
class PrepareBench:
    """Time prepare against tiktoken alone, and measure its memory."""

    src: Positional[str]
    """Text, as for mlx_mla.prepare."""
    bpe_dir: Optional[str] = None
    """Folder with encoder.json and vocab.bpe. None: tiktoken downloads them once."""
    megabytes: float = 60
    """Text to time, and a quarter of what memory is measured on."""
    web_page: int = 4500
    """Characters of the shorter documents; the mean of FineWeb-Edu's is about that."""
    repetitions: int = 3
    """Rounds of all."""
    memory_shard_tokens: int = 5_000_000
    """--shard-tokens for the measurement of memory: small, so that both inputs fill several
    shards."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    bench = cli.parse(PrepareBench, argv, PROG)
    if min(bench.web_page, bench.repetitions) < 1 or not bench.megabytes > 0:
        raise UserError("--megabytes must be positive, --web-page and --repetitions at least 1")
    rows, memory = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for name, cut in (("whole", None), (f"{bench.web_page} characters", bench.web_page)):
            rows += speed(bench, name, cut, Path(temporary) / f"cut-{cut}")
        for factor in (1, 4):
            memory.append(
                peak(
                    bench, int(factor * bench.megabytes * 1e6), Path(temporary) / f"memory-{factor}"
                )
            )
    measured = {"speed": rows, "memory": memory, "threads": CORES}
    packages = ("tiktoken", "numpy", "pyarrow")
    found = document("bench.prepare", PROG, argv, bench, {}, packages, **measured)
    publish(REPORT, found, bench.out)
    return 0


def texts(src: str, size: int, cut: int | None) -> Iterator[str]:
    """Documents of SRC, over and over, until there are so many bytes; in pieces of `cut`
    characters."""
    while True:
        for source in find_sources(src, Reading())[0]:
            for block in source.blocks(None, 1 << 20):
                for text in block.documents():
                    for i in range(0, len(text or ""), cut or sys.maxsize):
                        piece = (text or "")[i : i + (cut or sys.maxsize)]
                        yield piece
                        size -= len(piece.encode())
                        if size <= 0:
                            return


def write(documents: Iterator[str] | Sequence[str], folder: Path, files: int = FILES) -> int:
    """Write JSON lines, spread over some files; returns the bytes of text."""
    folder.mkdir(parents=True)
    handles = [(folder / f"{i}.jsonl").open("w", encoding="utf-8") for i in range(files)]
    size = 0
    for i, text in enumerate(documents):
        handles[i % files].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        size += len(text.encode())
    for handle in handles:
        handle.close()
    return size


def speed(bench: PrepareBench, name: str, cut: int | None, folder: Path) -> list[Row]:
    """A row for each subject."""
    documents = list(texts(bench.src, int(bench.megabytes * 1e6), cut))
    size = write(documents, folder / "plain")
    (folder / "xz").mkdir()

    def pack(path: Path) -> None:
        (folder / "xz" / f"{path.name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=2))

    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(pack, (folder / "plain").iterdir()))
    encoding = GPT2Tokenizer(bench.bpe_dir)._encoding
    encoding.encode_ordinary_batch(documents[:8], num_threads=CORES)

    def unpack() -> None:
        for path in (folder / "xz").iterdir():
            with lzma.open(path) as file:
                while file.read(1 << 20):
                    pass

    def run(kind: str) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            command = prepare.PrepareCommand(
                src=str(folder / kind),
                out=Path(out) / "shards",
                bpe_dir=bench.bpe_dir,
                val_fraction=VAL_FRACTION,
            )
            prepare.prepare(command, Console(quiet=True))

    subjects: dict[str, Callable[[], object]] = {
        ALONE: lambda: encoding.encode_ordinary_batch(documents, num_threads=CORES),
        PLAIN: lambda: run("plain"),
        XZ: lambda: run("xz"),
        UNPACK: unpack,
    }
    seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
    cpu_seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
    for _ in range(bench.repetitions):
        for subject, call in subjects.items():
            began, cpu = time.perf_counter(), time.process_time()
            call()
            seconds[subject].append(time.perf_counter() - began)
            cpu_seconds[subject].append(time.process_time() - cpu)
    return [
        {
            "documents": name, "count": len(documents), "subject": subject, "bytes": size,
            "seconds": seconds[subject], "cpu_seconds": cpu_seconds[subject],
        }
        for subject in subjects
    ]  # fmt: skip


def peak(bench: PrepareBench, size: int, folder: Path) -> Row:
    """Peak memory of a preparation of so many bytes of text, in a process of its own."""
    size = write(texts(bench.src, size, bench.web_page), folder / "plain")
    argv = [
        str(folder / "plain"),
        "--out",
        str(folder / "out"),
        "--shard-tokens",
        str(bench.memory_shard_tokens),
    ]
    argv += ["--bpe-dir", bench.bpe_dir] if bench.bpe_dir else []
    code = (
        "import sys; from mlx_mla import machine, prepare; code = prepare.main(sys.argv[1:]); "
        "print(machine.peak_memory()); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True, check=True
    )
    return {"bytes": size, "peak_bytes": int(done.stdout.splitlines()[-1])}


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """The tables."""
    rows: list[Row] = found["speed"]
    lines = [
        f"- GPT-2's tokenizer, {found['threads']} threads, median of "
        f"{found['settings']['repetitions']} in turns; MB are 10^6 bytes of text", "",
        "| documents | subject | MB/s | slowest - fastest | against tiktoken | MB by CPU second | "
        "against tiktoken |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    reference = {r["documents"]: r for r in rows if r["subject"] == ALONE}
    for r in rows:
        rates = sorted(r["bytes"] / 1e6 / s for s in r["seconds"])
        cpu_rate = r["bytes"] / 1e6 / statistics.median(r["cpu_seconds"])
        ratios = [
            f"{statistics.median(reference[r['documents']][key]) / statistics.median(r[key]):.2f}x"
            for key in ("seconds", "cpu_seconds")
        ]
        if r["subject"] == UNPACK:
            ratios = ["", ""]
        lines.append(
            f"| {r['count']:,}, {r['documents']} | {r['subject']} | {statistics.median(rates):.1f} "
            f"| {rates[0]:.1f} - {rates[-1]:.1f} | {ratios[0]} | {cpu_rate:.1f} | {ratios[1]} |"
        )
    lines += [
        "",
        f"Memory with `--shard-tokens {found['settings']['memory_shard_tokens']}`:",
        "",
        "| text | peak |",
        "|---|---|",
    ]
    lines += [
        f"| {m['bytes'] / 1e6:,.4g} MB | {m['peak_bytes'] / 2**20:,.0f} MiB |"
        for m in found["memory"]
    ]
    return lines


REPORT = Report("prepare", "Preparing data beside tiktoken alone", body)


if __name__ == "__main__":
    sys.exit(main())
