"""Checks of whole commands: the doctor's facts, a Mac's CPU and GPU, the server, the converter and
the benchmark; and those for which MLX itself is imported, by the row that needs it alone."""

import concurrent.futures
import json
import sys
from pathlib import Path

import numpy as np

from mlx_mla.backends import get_backend
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.checks import commands, models
from mlx_mla.checks.row import Outcome, at_most, together
from mlx_mla.checks.training import SMALL

CLIENTS, TURNS = 4, 5
PROMPTS = ("The st", "A longer prompt of words", "x", "def f(self)", "1, 2, 3")


def facts(place: Path) -> Outcome:
    """The doctor names what is here, and measures rates of matrix products."""
    found = json.loads(commands.run("mlx_mla.doctor", "--probe", "mlx").splitlines()[-1])["facts"]
    rates = {key: value for key, value in found.items() if "matmul" in key}
    right = all(float(v.split()[0].replace(",", "")) > 0 for v in rates.values()) and bool(rates)
    if sys.platform == "darwin":
        right = right and found["MLX GPU"] == "Metal" and found["MLX BLAS"] == "Accelerate"
        right = right and "MLX memory limit" in found
    return Outcome(right, ", ".join(f"{key} {value}" for key, value in rates.items()))


def fused_kernels(place: Path) -> Outcome:
    """See `metal.shared_head`."""
    from mlx_mla.checks import metal

    return metal.shared_head()


def fused_decoding(place: Path) -> Outcome:
    """See `metal.both_paths`."""
    from mlx_mla.checks import metal

    return metal.both_paths(place)


def both_devices(place: Path) -> Outcome:
    """Training and generation, with a quantized cache, where the flag says."""
    found = {}
    for device in ("cpu", "auto"):
        run = place / device
        commands.run(
            "mlx_mla.train", *SMALL, "--steps", 3, "--save-every", 0, "--device", device,
            "--out", run,
        )  # fmt: skip
        said = commands.run(
            "mlx_mla.generate", "--model", run, "--prompt", "The ", "--temp", 0,
            "--max-tokens", 20, "--kv-bits", 8, "--device", device, "--json",
        )  # fmt: skip
        text = json.loads(said)
        found[device] = Outcome(
            text["tokens"] > 0,
            f"{text['tokens']} tokens, peak {text['peak_memory_bytes'] / 2**20:.0f} MiB",
        )
    return together(found)


def server(place: Path) -> Outcome:
    """Clients at once get the text that each gets alone, and a wrong request is refused."""
    model = models.small_model(place / "model")
    with commands.serving(model.path) as address:
        alone = {prompt: commands.ask(address, _request(prompt)) for prompt in PROMPTS}
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            turns = [PROMPTS[i % len(PROMPTS)] for i in range(CLIENTS * TURNS)]
            answers = list(pool.map(lambda p: commands.ask(address, _request(p)), turns))
            refused, _ = commands.ask(address, {"prompt": ""})
    right = sum(answer == alone[p] and answer[0] == 200 for p, answer in zip(turns, answers))
    return Outcome(
        right == len(turns) and refused == 400,
        f"{right} of {len(turns)} answers as alone; a wrong request got {refused}",
    )


def calibration(place: Path) -> Outcome:
    """`--to mla` with calibration on MPS and on the CPU: the models have the same score."""
    source = models.small_model(place / "mha", "gpt2-124m")
    ids, found = np.arange(60, dtype=np.int32).reshape(2, 30), []
    for device in ("cpu", "mps"):
        commands.run(
            commands.converter(), source, "--out", place / device, "--to", "mla", "--rank", 384,
            "--calibration", "builtin", "--calibration-tokens", 8192,
            "--held-out-tokens", 4096, "--device", device,
        )  # fmt: skip
        scorer = get_backend("mlx", "cpu").scorer(ModelFolder(place / device))
        found.append(models.log_probabilities(scorer, ids, np.arange(20, 60, 8)))
    largest = float(np.abs(found[0] - found[1]).max())
    return at_most(largest, 0.01, "largest difference of a log-probability")


def benchmark(place: Path) -> Outcome:
    """Both backends side by side; one whose logits differ is reported and not timed."""
    commands.run("bench.compare_backends", "--quick", "--out", place / "out", cwd=commands.ROOT)
    found = json.loads((place / "out" / "results.json").read_text(encoding="utf-8"))
    wrong = [
        f"{r['measure']} of {r['backend']} {r['model']}: {r['status']}"
        for r in found["rows"]
        if r.get("status", "ok") != "ok"
    ] + [
        f"logits of {p['backend']} {p['model']} differ by {p['largest_logit_difference']:.2g}"
        for p in found["parity"]
        if not p["ok"]
    ]
    return Outcome(
        not wrong, "; ".join(wrong) or f"{len(found['rows'])} rows measured, logits agree"
    )


def _request(prompt: str) -> dict[str, object]:
    return {"prompt": prompt, "max_tokens": 12, "temperature": 0}
