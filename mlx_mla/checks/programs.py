"""Checks of whole commands: the doctor's facts, a Mac's CPU and GPU, the server, the converter and
the benchmark."""

import concurrent.futures
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_mla.backends import get_backend
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.checks import commands
from mlx_mla.checks.models import log_probabilities, small_model
from mlx_mla.checks.row import Outcome, at_most, row
from mlx_mla.checks.training import SMALL

CLIENTS, TURNS = 4, 5
PROMPTS = ("The st", "A longer prompt of words", "x", "def f(self)", "1, 2, 3")


@row(
    where=(
        "mlx_mla/machine.py:processor",
        "mlx_mla/backends/blas.py:in_use",
        "mlx_mla/backends/mlx/backend.py:device_info",
        "mlx_mla/backends/peak.py:measure_peak",
    ),
    expected="Metal and Accelerate on a Mac; rates near what is published for the chip",
    minutes=0.1,
)
def facts(place: Path) -> Iterator[Outcome]:
    """Processor, memory limit, BLAS and matrix rates in the doctor."""
    found = json.loads(commands.run("mlx_mla.doctor", "--probe", "mlx").splitlines()[-1])["facts"]
    if sys.platform == "darwin":
        for key, right in {"MLX GPU": "Metal", "MLX BLAS": "Accelerate"}.items():
            yield Outcome(found[key] == right, f"{key} {found[key]}")
        yield Outcome("MLX memory limit" in found, "a memory limit")
    for key in [key for key in found if "matmul" in key]:
        yield Outcome(float(found[key].split()[0].replace(",", "")) > 0, f"{key} {found[key]}")


@row(
    where=(
        "mlx_mla/backends/mlx/backend.py:limited_memory",
        "mlx_mla/backends/mlx/backend.py:memory_bytes",
        "mlx_mla/backends/mlx/device.py:find_device",
    ),
    expected="text from both",
    minutes=0.3,
)
def devices(place: Path) -> Iterator[Outcome]:
    """`--device cpu` and `auto`: training, and generation with a cache in 8 bits; wired memory on
    Metal."""
    for device in ("cpu", "auto"):
        train = ("--steps", 3, "--save-every", 0, "--device", device, "--out", place / device)
        commands.run("mlx_mla.train", *SMALL, *train)
        said = commands.run(
            "mlx_mla.generate", "--model", place / device, "--prompt", "The ", "--temp", 0,
            "--max-tokens", 20, "--kv-bits", 8, "--device", device, "--json",
        )  # fmt: skip
        text = json.loads(said)
        peak = f"{text['peak_memory_bytes'] / 2**20:.0f} MiB"
        yield Outcome(text["tokens"] > 0, f"{device}: {text['tokens']} tokens, peak {peak}")


@row(
    where=("mlx_mla/serve.py:Handler",),
    expected="each gets the text that it gets alone, the wrong one a 400",
    minutes=0.3,
)
def server(place: Path) -> Iterator[Outcome]:
    """`mlx_mla.serve` under four clients, one of whose requests is wrong."""
    with commands.serving(small_model(place / "model").path) as address:

        def ask(prompt: str) -> tuple[int, str]:
            return commands.ask(address, {"prompt": prompt, "max_tokens": 12, "temperature": 0})

        alone = {prompt: ask(prompt) for prompt in PROMPTS}
        turns = [PROMPTS[i % len(PROMPTS)] for i in range(CLIENTS * TURNS)]
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(ask, turns))
            refused, _ = ask("")
    right = sum(answer == alone[p] and answer[0] == 200 for p, answer in zip(turns, answers))
    yield Outcome(right == len(turns), f"{right} of {len(turns)} answers as alone")
    yield Outcome(refused == 400, f"a wrong request got {refused}")


@row(
    where=("convert/calibration.py:collect_moments", "convert/layerwise.py:convert_layers"),
    needs=("torch", "mps"),
    expected="models with the same score to 0.01 nats",
    minutes=0.5,
)
def calibration(place: Path) -> Iterator[Outcome]:
    """`convert --to mla` fitted to a text on MPS, which has no float64."""
    source = small_model(place / "mha", "gpt2-124m")
    ids, found = np.arange(60, dtype=np.int32).reshape(2, 30), []
    for device in ("cpu", "mps"):
        commands.run(
            commands.converter(), source, "--out", place / device, "--to", "mla", "--rank", 384,
            "--calibration", "builtin", "--calibration-tokens", 8192,
            "--held-out-tokens", 4096, "--device", device,
        )  # fmt: skip
        scorer = get_backend("mlx", "cpu").scorer(ModelFolder(place / device))
        found.append(log_probabilities(scorer, ids, np.arange(20, 60, 8)))
    yield at_most(np.abs(found[0] - found[1]).max(), 0.01, "log-probabilities differ by")


@row(
    where=(
        "bench/compare_backends.py:Bench",
        "bench/subjects/torch.py",
        "mlx_mla/backends/torch/device.py:peak_memory_bytes",
    ),
    needs=("checkout", "torch"),
    expected="logits agree, every row is measured",
    minutes=3,
)
def benchmark(place: Path) -> Iterator[Outcome]:
    """MLX against PyTorch in the benchmark, `compare_backends --quick`."""
    commands.run("bench.compare_backends", "--quick", "--out", place / "out", cwd=commands.ROOT)
    found = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    for r in found["rows"]:
        if (status := r.get("status", "ok")) != "ok":
            yield Outcome(False, f"{r['measure']} of {r['backend']} {r['model']}: {status}")
    for p in found["parity"]:
        off, of = p["largest_logit_difference"], f"{p['backend']} {p['model']}"
        yield at_most(off, p["allowed"], "logits differ by", of)
    yield Outcome(True, f"{len(found['rows'])} rows")
