"""`mlx_lm.server` under many clients: this project's models, and mlx-lm's own GPT-2, each served by
stock mlx-lm.

    python -m bench serve --out DIR

Every model has random weights and bytes as tokens. Each prompt is asked once alone; then all
clients ask for a while, each going through all prompts from another one on, and every answer is
compared with the one given alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from safetensors.numpy import save_file

from bench.harness import Benchmark, Document, Results, Row
from bench.rows import Figure, Positive, Whole, rows
from bench.subjects.contract import gpt2_shape
from mlx_mla import checkpoint
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.display import markdown_table
from mlx_mla.fields import Bounds, at_least_1, positive
from mlx_mla.model.presets import preset
from mlx_mla.model.weights import initial_weights

SERVER = "import mlx_mla.backends.mlx; from mlx_lm.server import main; main()"
THEIRS = "mlx-lm gpt2"
ROWS = rows({
    "model": str, "requests": Whole, "same": Whole, "different": Whole, "failed": Whole,
    "tokens_per_sec": Positive, "seconds": Figure,
    "median_latency": Figure, "worst_latency": Figure,
})  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Serve(Benchmark):
    """Measure mlx_lm.server with this project's models against mlx-lm's own GPT-2."""

    presets: tuple[str, ...] = ("gpt2-124m", "mla-124m", "mla-124m-r128")
    """Models to serve. Of one with multi-head attention, mlx-lm's own GPT-2 with the same weights
    is served as well."""
    layers: Annotated[int, at_least_1(10**4)] = 12
    """Layers of each."""
    clients: Annotated[int, at_least_1(10**4)] = 16
    """Clients that ask at once; also the number of prompts."""
    seconds: Annotated[float, positive(10**6)] = 60.0
    """How long they ask, in seconds."""
    max_tokens: Annotated[int, at_least_1(10**4)] = 32
    """Tokens of an answer."""
    prompt_bytes: Annotated[int, Bounds("be at least 8", 8, 10**6)] = 400
    """Length of the longest prompt; the others are from an eighth of it up."""

    name = "serve"
    title = "mlx_lm.server under many clients"
    stored: ClassVar = {"rows": ROWS}
    packages: ClassVar = ("mlx", "mlx-lm")
    devices: ClassVar = {"mlx": "auto"}

    def measure(self, results: Results) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in self.presets:
                for label, model in models(Path(folder), name, self.layers):
                    row = asked(self, label, model)
                    print(*cells(row, None), sep="  ", flush=True)
                    results.add(row)

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        rows, s = found["rows"], found["settings"]
        theirs = next((r["tokens_per_sec"] for r in rows if r["model"] == THEIRS), None)
        return [
            f"- {s['layers']} layers, random weights, float32; {s['clients']} clients for "
            f"{s['seconds']:g} s, prompts of {s['prompt_bytes'] // 8} to {s['prompt_bytes']} "
            f"tokens, {s['max_tokens']} tokens an answer",
            "",
            *markdown_table(COLUMNS, [cells(r, theirs) for r in rows]),
        ]


COLUMNS = ("model", "requests", "errors", "unlike the answer given alone", "tok/s",
           "against mlx-lm's", "latency, s")  # fmt: skip


def cells(r: Row, theirs: float | None) -> tuple[object, ...]:
    """The columns of a row."""
    return (
        r["model"], r["requests"], r["failed"], r["different"], f"{r['tokens_per_sec']:.1f}",
        f"{r['tokens_per_sec'] / theirs:.2f}x" if theirs else "-",
        f"{r['median_latency']:.2f}, worst {r['worst_latency']:.2f}",
    )  # fmt: skip


def models(work: Path, name: str, layers: int) -> Iterator[tuple[str, Path]]:
    """Folders of a preset with random weights, and of mlx-lm's `gpt2` with the same for multi-head
    attention."""
    config = dataclasses.replace(preset(name).model, vocab_size=257, n_layer=layers).resolved()
    ours, theirs = work / name, work / "gpt2"
    ours.mkdir()
    # Weights of this size make sharp predictions, which do not depend on the last bits of a sum.
    weights = initial_weights(config, 0, 0.06)
    checkpoint.write_model(ours, config, weights, ByteTokenizer().fast_tokenizer(), "")
    yield name, ours
    if not config.beyond_gpt2:
        shutil.copytree(ours, theirs)
        (theirs / "config.json").write_text(
            json.dumps({"model_type": "gpt2", **gpt2_shape(config)})
        )
        renamed = {k.replace("transformer.", "model.", 1): w for k, w in weights.items()}
        save_file(renamed, str(theirs / "model.safetensors"), {"format": "mlx"})
        yield THEIRS, theirs


def asked(s: Serve, label: str, folder: Path) -> Row:
    """Answers, errors and speeds of one model."""
    text, shortest = random.Random(0), s.prompt_bytes // 8
    letters = "abcdefghijklmnopqrstuvwxyz     "
    lengths = [shortest + i * (s.prompt_bytes - shortest) // s.clients for i in range(s.clients)]
    prompts = ["".join(text.choice(letters) for _ in range(n)) for n in lengths]
    with serving(folder) as port:
        alone = [ask(port, p, s.max_tokens)[0] for p in prompts]
        start = time.monotonic()

        def client(number: int) -> list[tuple[str, int, float]]:
            """Outcome, tokens and seconds of each request."""
            done: list[tuple[str, int, float]] = []
            for i in range(number, sys.maxsize):
                began = time.monotonic()
                if began >= start + s.seconds:
                    return done
                try:
                    answer, tokens = ask(port, prompts[i % len(prompts)], s.max_tokens)
                    outcome = "same" if answer == alone[i % len(prompts)] else "different"
                except (OSError, ValueError, KeyError) as e:
                    outcome, tokens = "failed", 0
                    print(f"{label}: error: {e}", file=sys.stderr)
                done.append((outcome, tokens, time.monotonic() - began))
            return done

        with concurrent.futures.ThreadPoolExecutor(s.clients) as pool:
            done = [d for own in pool.map(client, range(s.clients)) for d in own]
        took = time.monotonic() - start
    outcomes, tokens, latencies = zip(*done)
    return {
        "model": label, "requests": len(done), "tokens_per_sec": sum(tokens) / took,
        **{name: outcomes.count(name) for name in ("same", "different", "failed")},
        "seconds": took, "median_latency": statistics.median(latencies),
        "worst_latency": max(latencies),
    }  # fmt: skip


def ask(port: int, prompt: str, max_tokens: int) -> tuple[str, int]:
    """A greedy answer and its tokens."""
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}).encode()
    url = f"http://127.0.0.1:{port}/v1/completions"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        values = json.loads(answer.read())
    return values["choices"][0]["text"], values["usage"]["completion_tokens"]


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[int]:
    """A stock server on a free port of this machine alone."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    flags = ["--model", str(folder), "--port", str(port), "--trust-remote-code"]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"mlx_lm.server ended with {process.returncode}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.25)
        else:
            raise RuntimeError("mlx_lm.server did not load the model in 150 s")
        yield port
    finally:
        process.terminate()
        process.wait(30)
