"""What is measured of a study's arms beside their loss: decoding, and the evaluation tasks."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.studying.agenda import best_run
from bench.studying.plan import Cell, Study
from bench.studying.results import Results
from mlx_mla import checkpoint
from mlx_mla.errors import UserError

DECODE_CONTEXT, DECODE_STEPS, DECODE_REPETITIONS = 1000, 100, 9


def evaluate(study: Study, results: Results, runs: Path, console: Console) -> None:
    """Run the evaluation tasks on the first seed's run at every arm's rate, once for all.

    Raises:
        UserError: If mlx_mla.evaluate refuses something.
    """
    done = {row["key"]: row for row in results.measured.get("evaluate", [])}
    options = {"tasks": "wikitext2,lambada,hellaswag", **study.evaluate}
    for cell in study.cells:
        run = best_run(study, results, cell)
        if run is None or run.key in done:
            continue
        folder = runs / run.name
        if checkpoint.latest(folder) is None:
            console.print(f"not evaluated: {run.name}, whose weights are not here", highlight=False)
            continue
        console.print(f"evaluating {run.name}", highlight=False)
        report = folder / "evaluation.json"
        command = [sys.executable, "-m", "mlx_mla.evaluate", "--model", str(folder)]
        command += ["--out", str(report), "--backend", run.config.backend]
        command += ["--device", run.config.device]
        command += ["--resume"] if report.exists() else []
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            said = ended.stderr.strip().splitlines() or ["it said nothing"]
            raise UserError(f"{run.name}: {said[-1].removeprefix('error: ')}")
        tasks = json.loads(report.read_text(encoding="utf-8"))["models"][0]["tasks"]
        done[run.key] = {"run": run.name, "key": run.key, **_place(cell), "tasks": tasks}
        results.measured["evaluate"] = list(done.values())
        results.save()


def decode(study: Study, results: Results, console: Console) -> None:
    """Time greedy decoding at batch 1 after 1000 tokens, arms of a size in turns.

    The weights are random, and the positions as many as it takes: speed depends on shapes alone.
    """
    from bench import subjects
    from mlx_mla.decoding.request import cache_of
    from mlx_mla.model.weights import initial_weights

    rows = []
    for size in study.sizes:
        cells = [c for c in study.cells if c.size == size]
        timed, kinds = {}, {}
        for arm, cell in {c.arm: c for c in cells}.items():  # budgets decode alike
            config, length = cell.config, DECODE_CONTEXT + DECODE_STEPS + 2
            model = dataclasses.replace(
                config.model, n_positions=max(length, config.model.n_positions)
            )
            weights = initial_weights(model, 0)
            device = config.device
            timed[arm] = subjects.load(config.backend, arm, model, weights, config.dtype, device)
            kinds[arm] = cache_of(model, "latent")
        times: dict[str, list[float]] = {arm: [] for arm in timed}
        nbytes: dict[str, int | None] = {}
        for repetition in range(DECODE_REPETITIONS + 1):
            for arm, subject in timed.items():
                decoded = subject.decode(1, DECODE_CONTEXT, DECODE_STEPS, kinds[arm])
                nbytes[arm] = decoded.cache_bytes
                if repetition:  # the first round warms up
                    times[arm].append(DECODE_STEPS / decoded.seconds)
        for cell in cells:
            arm = cell.arm
            values = sorted(times[arm])
            rows.append(
                {
                    **_place(cell),
                    "key": cell.key,
                    "cache": kinds[arm],
                    "tokens_per_second": values[len(values) // 2],
                    "min": values[0],
                    "max": values[-1],
                    "cache_bytes": nbytes[arm],
                    "backend": cell.config.backend,
                    "dtype": cell.config.dtype,
                    "threads": os.environ.get("OMP_NUM_THREADS", "as the libraries choose"),
                }
            )
        console.print(f"decoding of {size} is measured", highlight=False)
    results.measured["decode"] = rows
    results.save()


def _place(cell: Cell) -> dict[str, Any]:
    return {"arm": cell.arm, "size": cell.size, "tokens": cell.tokens}
