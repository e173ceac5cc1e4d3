"""Measure training: memory by component against the estimate, and speed against a plain PyTorch
loop.

    python -m bench.training [--parts memory speed plan] [--quick] [--out bench/results]

`memory` takes one step of every model and type in MLX and sets what was held beside what
`--dry-run` says. `speed` times this project's sessions and a plain PyTorch loop (all logits,
torch.optim.AdamW; on CUDA compiled and under autocast) on the same batches, one of them in memory
at a time, half of the steps in order and half backwards; figures are medians, and only their ratios
should be compared between machines. `plan` measures nothing: it looks for the largest batch that
the estimate puts into memories of some sizes.
"""

import dataclasses
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import mlx.core as mx
import numpy as np

from bench.harness import Document, Report, Row, document, publish, row
from bench.subjects import release
from bench.timing import there_and_back
from mlx_mla import cli
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.errors import UserError
from mlx_mla.model.config import BackendName, TrainConfig
from mlx_mla.model.estimate import Estimate, estimate
from mlx_mla.model.presets import preset
from mlx_mla.model.weights import initial_weights

PROG = "python -m bench.training"
GIB = 2**30
WARM_UP = 2


@dataclasses.dataclass(kw_only=True)
class TrainingBench:
    """Measure memory and speed of training, and plan batches."""

    parts: tuple[Literal["memory", "speed", "plan"], ...] = ("memory", "speed", "plan")
    """What to do."""
    models: tuple[str, ...] = ("gpt2-124m", "mla-124m")
    """Presets."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of the computation. bfloat16 takes minutes a step on a CPU."""
    batch_size: int = 4
    """Sequences in a pass, for memory."""
    speed_batch_size: int = 1
    """The same, for speed."""
    seq_len: int = 1024
    """Tokens in a sequence, for memory."""
    speed_seq_len: int = 512
    """The same, for speed."""
    checkpoint_every: tuple[int, ...] = (0, 1)
    """Settings of gradient checkpointing, for memory."""
    memory_gb: tuple[int, ...] = (16, 32, 64, 128)
    """Memories to plan for, in GB."""
    usable: float = 0.7
    """Share of a memory that training may take, in the plan; the system and its programs have the
    rest."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device: a GPU where there is one, or the CPU."""
    repetitions: int = 5
    """Steps of each subject that are timed."""
    quick: bool = False
    """The nano preset only, 2 repetitions: a check that everything runs."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    bench = cli.parse(TrainingBench, argv, PROG)
    if bench.quick:
        bench = dataclasses.replace(
            bench, models=("nano",), repetitions=2,
            batch_size=2, seq_len=64, speed_batch_size=2, speed_seq_len=64,
        )  # fmt: skip
    for name in bench.models:
        preset(name)  # raises for an unknown one
    if bench.repetitions < 1 or not 0 < bench.usable <= 1:
        raise UserError("--repetitions must be at least 1, and --usable in (0, 1]")
    backend = MLXBackend(bench.device)
    rows = memory(bench, backend) if "memory" in bench.parts else []
    rows += speed(bench) if "speed" in bench.parts else []
    rows += plan(bench) if "plan" in bench.parts else []
    backends: tuple[BackendName, ...] = ("mlx", "torch") if "speed" in bench.parts else ("mlx",)
    devices = dict.fromkeys(backends, bench.device)
    found = document("bench.training", PROG, argv, bench, devices, rows=rows)
    publish(REPORT, found, bench.out)
    return 0


def settings(name: str, **changes: Any) -> TrainConfig:
    """A preset with one pass a step."""
    base = dataclasses.replace(preset(name), tokens_per_step=None, grad_accum_steps=1)
    return dataclasses.replace(base, **changes).resolved()


def memory(bench: TrainingBench, backend: MLXBackend) -> list[Row]:
    """Bytes that one step holds, by component, and the estimate of each."""
    rows = []
    for name in bench.models:
        for dtype in bench.dtypes:
            for every in bench.checkpoint_every:
                config = settings(
                    name,
                    dtype=dtype,
                    activation_checkpointing=every,
                    batch_size=bench.batch_size,
                    seq_len=bench.seq_len,
                )
                expected = estimate(config, backend.fused_attention(config))
                measured = measure_memory(config, backend, expected)
                rows.append(
                    {
                        "what": "memory",
                        "preset": name,
                        "dtype": dtype,
                        "checkpoint_every": every,
                        "batch_size": bench.batch_size,
                        "seq_len": bench.seq_len,
                        "measured": measured,
                        "estimate": {
                            **dataclasses.asdict(expected),
                            "total_bytes": expected.total_bytes,
                        },
                    }
                )
                print(memory_line(rows[-1]), file=sys.stderr)
    return rows


def measure_memory(config: TrainConfig, backend: MLXBackend, expected: Estimate) -> dict[str, int]:
    """Bytes of one step in MLX: held before it, held by its gradients, and the peak."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    with backend.limited_memory(before + expected.total_bytes):
        session = MLXBackend().train_session(config, Start(initial_weights(config.model, 0)))
        mx.clear_cache()
        state = mx.get_active_memory() - before
        mx.reset_peak_memory()
        x = np.random.default_rng(0).integers(
            0, config.model.vocab_size, (config.batch_size, config.context)
        )
        session.model.train()
        loss, grads = session._grad_step(mx.array(x), mx.array(x))
        mx.eval(loss, grads)
        held = mx.get_active_memory() - before - state
        norm = session._apply_step(grads, mx.array(1.0))
        del grads
        mx.eval(session.model.state, session.optimizer.state, norm)
        peak = mx.get_peak_memory() - before
    return {
        "state_bytes": state,
        "gradient_bytes": held,
        "activation_bytes": peak - state - held,
        "total_bytes": peak,
    }


def speed(bench: TrainingBench) -> list[Row]:
    """Training tokens per second of every session and of the plain loop."""
    from bench import torch_loop

    ways = {"plain PyTorch loop": torch_loop.plain_step, "torch": torch_loop.our_step}
    ways["mlx"] = mlx_step
    rng = np.random.default_rng(0)
    rows = []
    for dtype in bench.dtypes:
        shape = {"batch_size": bench.speed_batch_size, "seq_len": bench.speed_seq_len}
        configs = {
            name: settings(name, dtype=dtype, device=bench.device, **shape) for name in bench.models
        }
        ids = rng.integers(
            0,
            min(c.model.vocab_size or 1 for c in configs.values()),
            (bench.speed_batch_size, bench.speed_seq_len + 1),
        )
        x, y = ids[:, :-1], ids[:, 1:]
        cases = [(name, way) for name in configs for way in ways]
        rates: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for (name, way), count in there_and_back(cases, bench.repetitions):
            step = ways[way](configs[name])
            for _ in range(WARM_UP):
                step(x, y)
            rates[name, way] += [torch_loop.rate(step, x, y) for _ in range(count)]
            del step  # weights, gradients and moments go before the next come
            release("mlx" if way == "mlx" else "torch")
        rows += [
            row("speed", name, way, "tok/s", values, dtype=dtype, tokens=y.size)
            for (name, way), values in rates.items()
        ]
    return rows


def mlx_step(config: TrainConfig) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function that takes one step of a session in MLX."""
    session = MLXBackend().train_session(config, Start(initial_weights(config.model, 0)))
    return lambda x, y: (session.step(0, 1e-4, [(x.astype(np.int32), y.astype(np.int32))]), None)[1]


def largest_batch(config: TrainConfig, limit: float) -> int:
    """The largest power of two of sequences whose step fits; 0 if none does."""
    batch = 0
    while (
        estimate(dataclasses.replace(config, batch_size=max(1, 2 * batch)), True).total_bytes
        <= limit
    ):
        batch = max(1, 2 * batch)
        if batch >= 1024:
            break
    return batch


def plan(bench: TrainingBench) -> list[Row]:
    """The largest batch for every memory, without and with gradient checkpointing."""
    rows = []
    for name in bench.models:
        for dtype in ("float32", "bfloat16"):
            for gb in bench.memory_gb:
                plain, saving = (
                    largest_batch(
                        settings(
                            name, dtype=dtype, seq_len=bench.seq_len, activation_checkpointing=every
                        ),
                        bench.usable * gb * 1e9,
                    )
                    for every in (0, 1)
                )
                rows.append({
                    "what": "plan", "preset": name, "dtype": dtype, "memory_gb": gb,
                    "batch": plain, "batch_checkpointed": saving,
                })  # fmt: skip
    return rows


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """A table a part."""
    rows: list[Row] = found["rows"]
    bench = found["settings"]
    lines = [""]
    held = [r for r in rows if r["what"] == "memory"]
    if held:
        lines += [
            f"Memory of one step in MLX, batch {bench['batch_size']} x {bench['seq_len']}, in "
            "MB, measured / estimated:", "",
            "| model | type | checkpointing | weights, optimiser | gradients | activations | peak "
            "| estimate off by |",
            "|---|---|---|---|---|---|---|---|", *map(memory_line, held), "",
        ]  # fmt: skip
    timed = [r for r in rows if r["what"] == "speed"]
    if timed:
        lines += [
            f"Training tok/s, median of {bench['repetitions']} steps (smallest - largest):",
            "",
        ]
        lines += ["| model | type | tokens a step | subject | tok/s | against the plain loop |"]
        lines += ["|---|---|---|---|---|---|"]
        for r in timed:
            same = (x for x in timed if (x["preset"], x["dtype"]) == (r["preset"], r["dtype"]))
            plain = next(x for x in same if x["case"] == "plain PyTorch loop")
            lines.append(
                f"| {r['preset']} | {r['dtype']} | {r['tokens']} | {r['case']} | "
                f"{r['median']:,.0f} "
                f"({r['min']:,.0f} - {r['max']:,.0f}) | {r['median'] / plain['median']:.2f}x |"
            )
        lines.append("")
    planned = [r for r in rows if r["what"] == "plan"]
    if planned:
        memories = list(dict.fromkeys(r["memory_gb"] for r in planned))
        lines += [
            f"Largest batch of sequences of {bench['seq_len']} tokens whose step the estimate fits "
            f"into {bench['usable']:.0%}"
            " of a memory (fused attention; with gradient checkpointing at every block in "
            "brackets):", "",
            "| model | type | " + " | ".join(f"{gb} GB" for gb in memories) + " |",
            "|---|---|" + "---|" * len(memories),
        ]  # fmt: skip
        for name, dtype in dict.fromkeys((r["preset"], r["dtype"]) for r in planned):
            own = [r for r in planned if (r["preset"], r["dtype"]) == (name, dtype)]
            cells = (f"{r['batch']} ({r['batch_checkpointed']})" for r in own)
            lines.append(f"| {name} | {dtype} | " + " | ".join(cells) + " |")
    return lines


def memory_line(r: Row) -> str:
    measured, e = r["measured"], r["estimate"]

    def pair(name: str, expected: int) -> str:
        return f"{measured[name] / 1e6:,.0f} / {expected / 1e6:,.0f}"

    return (
        f"| {r['preset']} | {r['dtype']} | {r['checkpoint_every'] or 'off'} "
        f"| {pair('state_bytes', e['weights_bytes'] + e['optimizer_bytes'])} "
        f"| {pair('gradient_bytes', e['gradient_bytes'])} | "
        f"{pair('activation_bytes', e['activation_bytes'])} "
        f"| {pair('total_bytes', e['total_bytes'])} | "
        f"{e['total_bytes'] / measured['total_bytes'] - 1:+.0%} |"
    )


REPORT = Report("training", "Memory and speed of training", body)


if __name__ == "__main__":
    sys.exit(main())
