"""Measure mlx_mla.prepare: text per second against tiktoken alone, and memory at two sizes of
input.

    python -m bench prepare SRC --bpe-dir DIR [--megabytes 60] [--out DIR]

tiktoken's `encode_ordinary_batch` gets the documents as strings in memory, and as many threads as
there are cores. `prepare` reads the same documents from JSON lines, plain and compressed, and does
all else until the shards are on disk. They take turns. Each is measured on the documents as they
are and cut into pieces of the size of a web page, which take more of Python's time. Decompressing
is also timed alone, on one core. Memory is the peak of a process of its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

from rich.console import Console
from tyro.conf import Positional

from bench.harness import Benchmark, Document, Results, Row, cores
from bench.rows import Positive, Positives, Whole, rows
from bench.timing import turns
from mlx_mla import prepare
from mlx_mla.data.documents import Reading, find_sources
from mlx_mla.data.tokenizer import GPT2Tokenizer
from mlx_mla.display import markdown_table
from mlx_mla.fields import PositiveInt, positive

ALONE, PLAIN, XZ = "tiktoken alone", "prepare, .jsonl", "prepare, .jsonl.xz"
UNPACK = "xz alone, one core"
FILES = 8
VAL_FRACTION = 0.2  # large, so that few whole books leave none out
CORES = cores()
SPEED = rows({
    "documents": str, "count": Whole, "subject": str, "bytes": Positive, "seconds": Positives,
    "cpu_seconds": Positives,
})  # fmt: skip
MEMORY = rows({"bytes": Whole, "peak_bytes": Whole})


@dataclasses.dataclass(kw_only=True)
class Prepare(Benchmark):
    """Time prepare against tiktoken alone, and measure its memory."""

    src: Positional[str]
    """Text, as for mlx_mla.prepare."""
    bpe_dir: Optional[str] = None
    """Folder with encoder.json and vocab.bpe. None: tiktoken downloads them once."""
    megabytes: Annotated[float, positive(10**6)] = 60
    """Size of the text to time. Memory is measured on as much, and on four times as much."""
    web_page: PositiveInt = 4500
    """Characters of the shorter documents; the mean of FineWeb-Edu's is about that."""
    repetitions: PositiveInt = 3
    """Timed runs of every subject."""
    memory_shard_tokens: PositiveInt = 5_000_000
    """--shard-tokens for the measurement of memory: small, so that both inputs fill several
    shards."""

    name = "prepare"
    title = "Preparing data beside tiktoken alone"
    stored: ClassVar = {"speed": SPEED, "memory": MEMORY, "threads": int}
    packages: ClassVar = ("tiktoken", "numpy", "pyarrow")

    def measure(self, results: Results) -> None:
        results.add(threads=CORES)
        with tempfile.TemporaryDirectory() as temporary:
            for name, cut in (("whole", None), (f"{self.web_page} characters", self.web_page)):
                results.add(*speed(self, name, cut, Path(temporary) / f"cut-{cut}"), to="speed")
            for factor in (1, 4):
                size = int(factor * self.megabytes * 1e6)
                results.add(peak(self, size, Path(temporary) / f"memory-{factor}"), to="memory")

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        median, s = statistics.median, found["settings"]
        alone = {r["documents"]: r for r in found["speed"] if r["subject"] == ALONE}
        lines = []
        for r in found["speed"]:
            rates = sorted(r["bytes"] / 1e6 / seconds for seconds in r["seconds"])
            wall, cpu = (
                f"{median(alone[r['documents']][key]) / median(r[key]):.2f}x"
                if r["documents"] in alone and r["subject"] != UNPACK
                else ""
                for key in ("seconds", "cpu_seconds")
            )
            lines.append((
                f"{r['count']:,}, {r['documents']}", r["subject"], f"{median(rates):.1f}",
                f"{rates[0]:.1f} - {rates[-1]:.1f}", wall,
                f"{r['bytes'] / 1e6 / median(r['cpu_seconds']):.1f}", cpu,
            ))  # fmt: skip
        header = ("documents", "subject", "MB/s", "slowest - fastest", "against tiktoken",
                  "MB by CPU second", "against tiktoken")  # fmt: skip
        memory = [
            (f"{m['bytes'] / 1e6:,.4g} MB", f"{m['peak_bytes'] / 2**20:,.0f} MiB")
            for m in found["memory"]
        ]
        return [
            f"- GPT-2's tokenizer, {found['threads']} threads, median of {s['repetitions']} in "
            "turns; MB are 10^6 bytes of text",
            "",
            *markdown_table(header, lines),
            "",
            f"Memory with `--shard-tokens {s['memory_shard_tokens']}`:",
            "",
            *markdown_table(("text", "peak"), memory),
        ]


def texts(src: str, size: int, cut: int | None) -> Iterator[str]:
    """Documents of SRC, over and over, until there are so many bytes; in pieces of `cut`
    characters."""
    while True:
        for source in find_sources(src, Reading())[0]:
            for block in source.blocks(None, 1 << 20):
                for text in filter(None, block.documents()):
                    step = cut or len(text)
                    for piece in (text[i : i + step] for i in range(0, len(text), step)):
                        yield piece
                        size -= len(piece.encode())
                        if size <= 0:
                            return


def write(documents: Iterable[str], folder: Path, xz: bool = False) -> int:
    """Write JSON lines, spread over some files; returns the bytes of text."""
    folder.mkdir(parents=True)
    opened: Any = functools.partial(lzma.open, preset=2) if xz else open
    paths, size = (folder / f"{i}.jsonl{'.xz' * xz}" for i in range(FILES)), 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(opened(p, "wt", encoding="utf-8")) for p in paths]
        for file, text in zip(itertools.cycle(files), documents):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    return size


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call, and seconds of CPU time."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - cpu


def speed(bench: Prepare, name: str, cut: int | None, folder: Path) -> list[Row]:
    """A row for each subject."""
    documents = list(texts(bench.src, int(bench.megabytes * 1e6), cut))
    size = write(documents, folder / "plain")
    write(documents, folder / "xz", xz=True)
    encoding = GPT2Tokenizer(bench.bpe_dir)._encoding
    encoding.encode_ordinary_batch(documents[:8], num_threads=CORES)

    def unpack() -> None:
        for path in (folder / "xz").iterdir():
            lzma.decompress(path.read_bytes())

    def run(kind: str) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            command = prepare.PrepareCommand(
                src=str(folder / kind), out=Path(out) / "shards", bpe_dir=bench.bpe_dir,
                val_fraction=VAL_FRACTION,
            )  # fmt: skip
            prepare.prepare(command, Console(quiet=True))

    calls: dict[str, Callable[[], object]] = {
        ALONE: lambda: encoding.encode_ordinary_batch(documents, num_threads=CORES),
        PLAIN: lambda: run("plain"),
        XZ: lambda: run("xz"),
        UNPACK: unpack,
    }
    actions = {subject: functools.partial(timed, call) for subject, call in calls.items()}
    return [
        {
            "documents": name, "count": len(documents), "subject": subject, "bytes": size,
            "seconds": [s for s, _ in times], "cpu_seconds": [cpu for _, cpu in times],
        }
        for subject, times in turns(actions, bench.repetitions, warm_up=0).items()
    ]  # fmt: skip


def peak(bench: Prepare, size: int, folder: Path) -> Row:
    """Peak memory of a preparation of so many bytes of text, in a process of its own."""
    size = write(texts(bench.src, size, bench.web_page), folder / "plain")
    argv = [str(folder / "plain"), "--out", str(folder / "out")]
    argv += ["--shard-tokens", str(bench.memory_shard_tokens)]
    argv += ["--bpe-dir", bench.bpe_dir] if bench.bpe_dir else []
    code = (
        "import sys; from mlx_mla import machine, prepare; code = prepare.main(sys.argv[1:]); "
        "print(machine.peak_memory()); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {"bytes": size, "peak_bytes": int(done.stdout.splitlines()[-1])}
