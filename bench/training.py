"""Measure the memory of training by component against the estimate, and plan batches.

    python -m bench training [--parts memory plan] [--quick] [--out DIR]

`memory` takes one step of every model and type in MLX and sets what was held beside what
`--dry-run` says. `plan` measures nothing: it looks for the largest batch that the estimate puts
into memories of some sizes. Speed is a measure of compare_backends: `--measures training loops`.
"""

import dataclasses
import gc
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import mlx.core as mx
import numpy as np

from bench import compare_report
from bench.harness import Benchmark, Document, Results, Row
from bench.rows import Positive, Whole, record, rows
from bench.rows import Row as Timed
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.display import markdown_table
from mlx_mla.fields import PositiveInt, not_negative, positive
from mlx_mla.model.config import BackendName, DeviceName
from mlx_mla.model.estimate import Estimate, estimate
from mlx_mla.model.presets import preset
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights

HELD = ("state_bytes", "gradient_bytes", "activation_bytes", "total_bytes")
"""Of weights and the optimizer's moments, gradients, activations, and the peak."""
MEMORY = rows({
    "preset": str, "dtype": str, "checkpoint_every": Whole, "batch_size": Whole, "seq_len": Whole,
    "measured": record({**dict.fromkeys(HELD, Whole), "total_bytes": Positive}),
    "estimate": record(dict.fromkeys(("weights_bytes", "optimizer_bytes", *HELD[1:]), Whole)),
})  # fmt: skip
PLAN = rows(
    {"preset": str, "dtype": str, "memory_gb": Whole, "batch": Whole, "batch_checkpointed": Whole}
)
"""The largest batches that fit, without and with gradient checkpointing."""


@dataclasses.dataclass(kw_only=True)
class Training(Benchmark):
    """Measure the memory of training, and plan batches."""

    parts: tuple[Literal["memory", "plan"], ...] = ("memory", "plan")
    """What to do: measure memory, plan batches."""
    models: tuple[str, ...] = ("gpt2-124m", "mla-124m")
    """Presets."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Types of the computation. bfloat16 takes minutes a step on a CPU."""
    batch_size: PositiveInt = 4
    """Sequences in a pass."""
    seq_len: PositiveInt = 1024
    """Tokens in a sequence."""
    activation_checkpointing: tuple[Annotated[int, not_negative(10**6)], ...] = (0, 1)
    """Settings of activation checkpointing to measure."""
    memory_gb: tuple[PositiveInt, ...] = (16, 32, 64, 128)
    """Memories to plan for, in GB."""
    usable: Annotated[float, positive(1)] = 0.7
    """Share of a memory that training may take, in the plan; the system and its programs have the
    rest."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device: a GPU where there is one, or the CPU."""
    quick: bool = False
    """The nano preset only: a check that everything runs."""

    name = "training"
    title = "Memory and speed of training"
    stored: ClassVar = {"rows": list[Timed], "memory": MEMORY, "plan": PLAN}

    @property
    def devices(self) -> dict[BackendName, DeviceName]:  # type: ignore[override]
        return {"mlx": self.device}

    def checked(self) -> Self:
        super().checked()
        small = {"models": ("nano",), "batch_size": 2, "seq_len": 64} if self.quick else {}
        for name in self.models:
            preset(name)  # raises for an unknown one
        return dataclasses.replace(self, **small)  # type: ignore[arg-type]

    def measure(self, results: Results) -> None:
        backend = MLXBackend(self.device)
        grid = itertools.product(self.models, self.dtypes, self.activation_checkpointing)
        for name, dtype, every in grid if "memory" in self.parts else ():
            config = settings(
                name, dtype=dtype, activation_checkpointing=every,
                batch_size=self.batch_size, seq_len=self.seq_len,
            )  # fmt: skip
            expected = estimate(config, backend.fused_attention(config))
            row = {
                "preset": name, "dtype": dtype, "checkpoint_every": every,
                "batch_size": config.batch_size, "seq_len": config.context,
                "measured": measure_memory(config, backend, expected),
                "estimate": {**dataclasses.asdict(expected), "total_bytes": expected.total_bytes},
            }  # fmt: skip
            print(*memory_cells(row), sep="  ", flush=True)
            results.add(row, to="memory")
        plans = itertools.product(self.models, ("float32", "bfloat16"), self.memory_gb)
        for name, type_, gb in plans if "plan" in self.parts else ():
            base = settings(name, dtype=type_, seq_len=self.seq_len)
            plain, saving = (
                largest_batch(
                    dataclasses.replace(base, activation_checkpointing=every),
                    self.usable * gb * 1e9,
                )
                for every in (0, 1)
            )
            row = {"preset": name, "dtype": type_, "memory_gb": gb}
            results.add({**row, "batch": plain, "batch_checkpointed": saving}, to="plan")

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        # Documents of earlier versions have speeds, too.
        lines = compare_report.body(found, pictures) if found.get("rows") else [""]
        s = found["settings"]
        if held := found.get("memory"):
            header = ["model", "type", "checkpointing", "weights, optimizer", "gradients",
                      "activations", "peak", "estimate off by"]  # fmt: skip
            lines += [
                f"Memory of one step in MLX, batch {s['batch_size']} x {s['seq_len']}, in MB, "
                "measured / estimated:",
                "",
                *markdown_table(header, [memory_cells(r) for r in held]),
                "",
            ]
        if planned := found.get("plan"):
            header = ["model", "type", *(f"{gb} GB" for gb in {r["memory_gb"]: 0 for r in planned})]
            cells: dict[tuple[str, str], list[str]] = {}
            for r in planned:
                own = cells.setdefault((r["preset"], r["dtype"]), [])
                own.append(f"{_batch(r['batch'])} ({_batch(r['batch_checkpointed'])})")
            lines += [
                f"Largest batch (a power of two) of sequences of {s['seq_len']} tokens whose step "
                f"the estimate fits into {s['usable']:.0%} of a memory (fused attention; with "
                "gradient checkpointing at every block in brackets):",
                "",
                *markdown_table(header, [(*key, *own) for key, own in cells.items()]),
            ]
        return lines


def settings(name: str, **changes: Any) -> TrainConfig:
    """A preset with one pass a step."""
    base = dataclasses.replace(preset(name), tokens_per_step=None, grad_accum_steps=1)
    return dataclasses.replace(base, **changes).resolved()


def measure_memory(config: TrainConfig, backend: MLXBackend, expected: Estimate) -> dict[str, int]:
    """Bytes of one step in MLX: held before it, held by its gradients, and the peak."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    limited = backend.limited_memory(before + expected.total_bytes)
    with limited, mx.stream(backend.device):
        session = backend.train_session(config, Start(initial_weights(config.model, 0)))
        mx.clear_cache()
        state = mx.get_active_memory() - before
        mx.reset_peak_memory()
        shape = (config.batch_size, config.context)
        x = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
        session.model.train()
        loss, grads = session._grad_step(mx.array(x), mx.array(x))
        mx.eval(loss, grads)
        gradients = mx.get_active_memory() - before - state
        norm = session._apply_step(grads, mx.array(1.0))
        del grads
        mx.eval(session.model.state, session.optimizer.state, norm)
        peak = mx.get_peak_memory() - before
    return dict(zip(HELD, (state, gradients, peak - state - gradients, peak)))


MOST = 1024


def _batch(size: int) -> str:
    return f"{MOST} or more" if size == MOST else str(size)


def largest_batch(config: TrainConfig, limit: float) -> int:
    """The largest power of two of sequences, up to MOST, whose step fits; 0 if none does."""
    batch = 0
    while batch < MOST:
        larger = max(1, 2 * batch)
        if estimate(dataclasses.replace(config, batch_size=larger), True).total_bytes > limit:
            break
        batch = larger
    return batch


def memory_cells(r: Row) -> tuple[str, ...]:
    """The columns of a row about memory."""
    measured, e = r["measured"], r["estimate"]
    expected = {**e, "state_bytes": e["weights_bytes"] + e["optimizer_bytes"]}
    return (
        r["preset"],
        r["dtype"],
        str(r["checkpoint_every"] or "off"),
        *(f"{measured[part] / 1e6:,.0f} / {expected[part] / 1e6:,.0f}" for part in HELD),
        f"{e['total_bytes'] / measured['total_bytes'] - 1:+.0%}",
    )
