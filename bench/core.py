"""Measure the main job: the compiled against the eager step, the three ways to decode, a save.

    python -m bench.core [--quick] [--out bench/results]

Within one process, alternatives take turns (round-robin), so that drift of the machine hits them
alike; figures are medians over the repetitions with the smallest and largest beside them, and only
their ratios should be compared between machines. Prints a table; writes NAME.json, NAME.md and
NAME.png, NAME being the machine and the date.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from bench.harness import Document, Report, Row, document, publish, row, take_turns
from mlx_mla import checkpoint, cli, files
from mlx_mla.backends.contract import Start
from mlx_mla.backends.mlx.backend import MLXBackend
from mlx_mla.backends.mlx.decode import WithoutCache
from mlx_mla.backends.mlx.load import build_model
from mlx_mla.backends.mlx.session import MLXTrainSession
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.errors import UserError
from mlx_mla.model.config import TrainConfig
from mlx_mla.model.model_mlx import Model
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights, num_parameters
from mlx_mla.pictures import pyplot

PROG = "python -m bench.core"
CACHES = ("latent", "materialized", "none")


@dataclasses.dataclass(kw_only=True)
class CoreBench:
    """Measure the compiled and the eager step, decoding with each kind of cache, and a checkpoint
    save."""

    presets: tuple[str, ...] = ("nano", "mla-124m", "mla-124m-r128")
    """Presets to decode with and to save. The training step is measured for nano alone."""
    contexts: tuple[int, ...] = (64, 256, 1000)
    """Tokens of prompt before the decoding that is timed; those a preset has no room for are left
    out."""
    new_tokens: int = 16
    """Tokens decoded in one repetition (2 without a cache)."""
    repetitions: int = 5
    """Repetitions of every measurement."""
    quick: bool = False
    """Only nano, short contexts, 2 repetitions: a check that everything runs."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    bench = cli.parse(CoreBench, argv, PROG)
    if bench.quick:
        bench = dataclasses.replace(
            bench, presets=("nano",), contexts=(16, 64), new_tokens=4, repetitions=2
        )
    for name in bench.presets:
        preset(name)  # raises for an unknown one
    if bench.repetitions < 1 or bench.new_tokens < 2 or min(bench.contexts, default=0) < 2:
        raise UserError("--repetitions must be at least 1, --new-tokens and --contexts at least 2")
    rows = training(bench) + decoding(bench) + saving(bench)
    packages = ("mlx", "mlx-lm", "numpy")
    found = document("bench.core", PROG, argv, bench, {"mlx": "auto"}, packages, rows=rows)
    publish(REPORT, found, bench.out)
    return 0


def training(bench: CoreBench) -> list[Row]:
    """Steps per second of nano's training step, compiled and eager."""
    config = resolved("nano")
    weights = initial_weights(config.model, 0, config.initializer_range)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 257, (config.batch_size, config.context + 1)).astype(np.int32)
    steps = 2 if bench.quick else 10
    sessions = {
        name: MLXBackend().train_session(
            dataclasses.replace(config, compile=name == "compiled"), Start(weights)
        )
        for name in ("compiled", "eager")
    }

    def measure(session: MLXTrainSession) -> float:
        began = time.perf_counter()
        for step in range(steps):
            session.step(step, 1e-4, [(tokens[:, :-1], tokens[:, 1:])])
        return steps / (time.perf_counter() - began)

    results = take_turns(
        {name: partial(measure, s) for name, s in sessions.items()}, bench.repetitions
    )
    return [
        row("training step", "nano", name, "steps/s", values) for name, values in results.items()
    ]


def decoding(bench: CoreBench) -> list[Row]:
    """Decoded tokens per second at batch 1, after a prompt, by kind of cache."""
    rows = []
    for name in bench.presets:
        config = resolved(name).model
        model = build_model(config, initial_weights(config, 0))
        for context in bench.contexts:
            if context + bench.new_tokens > config.n_positions:
                continue
            prompt = mx.zeros((context,), mx.int32)
            sizes: dict[str, int] = {}
            actions = {
                kind: partial(decode, model, kind, prompt, bench.new_tokens, sizes)
                for kind in CACHES
            }
            for kind, values in take_turns(actions, bench.repetitions).items():
                rows.append(
                    row(
                        "decoding",
                        name,
                        kind,
                        "tok/s",
                        values,
                        context=context,
                        cache_bytes=sizes[kind],
                    )
                )
    return rows


def decode(
    model: Model, kind: str, prompt: mx.array, new_tokens: int, sizes: dict[str, int]
) -> float:
    """Tokens per second after the first one, which comes with the prompt; notes the cache's
    bytes."""
    model.materialize_cache(kind == "materialized")
    decoder = WithoutCache(model) if kind == "none" else model
    cache = make_prompt_cache(decoder)
    count = 2 if kind == "none" else new_tokens
    began = 0.0
    for i, _ in enumerate(generate_step(prompt, decoder, max_tokens=count + 1, prompt_cache=cache)):
        if i == 0:
            began = time.perf_counter()
    sizes[kind] = 0 if kind == "none" else sum(c.nbytes for c in cache)
    return count / (time.perf_counter() - began)


def saving(bench: CoreBench) -> list[Row]:
    """Seconds that a training checkpoint takes: weights, optimiser state, checksums, sync,
    rename."""
    rows = []
    for name in bench.presets:
        config = resolved(name)
        session = MLXBackend().train_session(config, Start(initial_weights(config.model, 0)))
        with tempfile.TemporaryDirectory(dir=".") as folder:
            action = partial(save, config, session, Path(folder) / "step-1")
            values = take_turns({"save": action}, bench.repetitions)["save"]
        rows.append(
            row("checkpoint", name, "save", "s", values, bytes=12 * num_parameters(config.model))
        )
    return rows


def save(config: TrainConfig, session: MLXTrainSession, target: Path) -> float:
    """Seconds of one save."""
    began = time.perf_counter()
    with files.atomic_folder(target) as folder:
        checkpoint.write_model(
            folder, config.model, session.weights(), ByteTokenizer().fast_tokenizer(), ""
        )
        checkpoint.write_train_state(folder, session.optimizer_state(), {"step": 1})
    return time.perf_counter() - began


def resolved(name: str) -> TrainConfig:
    """A preset at its tokenizer's size, in float32, which CPUs compute at full speed."""
    return dataclasses.replace(preset(name).resolved(), dtype="float32")


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """A table a measurement, with ratios within this run."""
    rows: list[Row] = found["rows"]
    repetitions = found["settings"]["repetitions"]
    lines = [f"- median of {repetitions} (smallest - largest)", ""]

    def figure(r: Row) -> str:
        return f"{r['median']:.3g} ({r['min']:.3g} - {r['max']:.3g})"

    by_case = {(r["what"], r["preset"], r["case"], r.get("context")): r for r in rows}
    lines += ["| training step | steps/s | against eager |", "|---|---|---|"]
    eager = by_case["training step", "nano", "eager", None]
    for r in rows:
        if r["what"] == "training step":
            lines.append(
                f"| nano, {r['case']} | {figure(r)} | {r['median'] / eager['median']:.2f}x |"
            )
    lines += [
        "",
        "| decoding, batch 1 | context | tok/s | against none | against materialized | cache, "
        "bytes |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for r in rows:
        if r["what"] == "decoding":
            others = (
                by_case["decoding", r["preset"], kind, r["context"]]["median"]
                for kind in ("none", "materialized")
            )
            ratios = " | ".join(f"{r['median'] / other:.2f}x" for other in others)
            lines.append(
                f"| {r['preset']}, {r['case']} | {r['context']} | {figure(r)} | {ratios} | "
                f"{r['cache_bytes']:,} |"
            )
    lines += ["", "| checkpoint save | seconds | MB | MB/s |", "|---|---|---|---|"]
    for r in rows:
        if r["what"] == "checkpoint":
            lines.append(
                f"| {r['preset']} | {figure(r)} | {r['bytes'] / 1e6:.0f} | "
                f"{r['bytes'] / 1e6 / r['median']:.0f} |"
            )
    return lines


def figures(found: Document) -> dict[str, Any]:
    """Decoding speed against context, a panel a preset."""
    decoded = [r for r in found["rows"] if r["what"] == "decoding"]
    # One context makes no line.
    names = [n for n in PRESETS if len({r["context"] for r in decoded if r["preset"] == n}) > 1]
    if not names:
        return {}
    fig, axes = pyplot().subplots(
        1, len(names), figsize=(4 * len(names), 3.6), layout="constrained", squeeze=False
    )
    for ax, name in zip(axes[0], names):
        for kind in CACHES:
            points = [r for r in decoded if (r["preset"], r["case"]) == (name, kind)]
            ax.plot(
                [r["context"] for r in points],
                [r["median"] for r in points],
                marker="o",
                label=kind,
            )
        ax.set(
            title=name,
            xscale="log",
            yscale="log",
            xlabel="context (tokens)",
            ylabel="decoding (tok/s)",
        )
        ax.set_xticks(sorted({r["context"] for r in decoded if r["preset"] == name}))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.grid(alpha=0.3)
    axes[0][0].legend(title="cache")
    return {"core": fig}


REPORT = Report("core", "The training step, decoding by cache, and a save", body, figures)


if __name__ == "__main__":
    sys.exit(main())
