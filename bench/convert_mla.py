"""What latent attention costs a trained MHA model: perplexity by rank and method, before and after
healing.

    python -m bench.convert_mla --model RUN --work FOLDER [--out bench/results]

RUN is a multi-head model trained on TEXT by `python -m mlx_mla.train`, for example

    python -m mlx_mla.train --attention mha --n-layer 4 --n-head 4 --n-embd 256 \\
        --n-positions 128 --batch-size 16 --steps 3200 --warmup-steps 100 --learning-rate 3e-3 \\
        --initializer-range 0.06 --backend torch --data TEXT --out RUN

Calibration and healing read what the model was trained on, perplexity is of the part it held out.
Every loss is compared window by window with the MHA model's, so the difference has a standard error
of its own: windows are alike for both, and their own spread cancels. Finished cells are kept in
FOLDER, and an interrupted run goes on there.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, get_args

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from bench.harness import Document, Report, Row, document, publish
from convert.calibration import Text, collect_moments
from convert.latent import Method, Moments, share_ranks
from convert.to_mla import assemble, factorise
from mlx_mla import checkpoint, cli, files
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start, Teacher
from mlx_mla.backends.torch.load import build_model
from mlx_mla.data import corpus
from mlx_mla.data.shards import training_part
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.data.windows import TokenWindows
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.schedule import learning_rate
from mlx_mla.pictures import pyplot
from mlx_mla.training.run_folder import run_config

PROG = "python -m bench.convert_mla"
METHODS: tuple[Method, ...] = get_args(Method)
UNCONVERTED = "the MHA model"
Weights = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class ConvertBench:
    """Measure held-out perplexity of an MHA model made latent, by rank and method, and after
    healing."""

    model: Path
    """Run folder of the multi-head model."""
    work: Path
    """Folder for models and finished cells; the same one goes on where it was interrupted."""
    fractions: tuple[float, ...] = (1, 0.75, 0.5, 1 / 3, 1 / 6, 1 / 12)
    """Ranks to measure, as shares of n_embd."""
    methods: tuple[Literal["balanced", "whitened", "svd"], ...] = METHODS
    """Methods to measure."""
    calibration_tokens: int = 131072
    """Tokens of the training text to calibrate on."""
    held_out_windows: int = 512
    """Windows of the held-out text, spread evenly. 0: all."""
    heal: tuple[float, ...] = (0.01, 0.05)
    """Shares of the training tokens to heal on; none: --heal 0."""
    heal_fractions: tuple[float, ...] = (0.5, 1 / 3, 1 / 6)
    """Ranks to heal, as shares of n_embd."""
    heal_method: Literal["balanced", "whitened", "svd"] = "balanced"
    """Method of the models that are healed."""
    heal_budget: bool = True
    """Whether their rank is an average, shared out among the layers."""
    heal_learning_rate: float = 3e-5
    """Highest learning rate of healing."""
    heal_batch_size: int = 4
    """Sequences in a step of healing: small ones, since few tokens must give many steps."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measured model."""

    rank: int
    method: str
    budget: bool = False
    """The rank is an average, shared out among the layers."""
    heal: float = 0.0
    teacher: bool = False

    @property
    def name(self) -> str:
        method = f"{self.method}{'-budget' if self.budget else ''}"
        healed = f"-heal{self.heal:g}{'-teacher' if self.teacher else ''}" if self.heal else ""
        return f"r{self.rank}-{method}{healed}"


class Bench:
    """The source model, its text, and what was measured."""

    def __init__(self, options: ConvertBench):
        self.options = options
        self.run = run_config(options.model)
        self.folder = checkpoint.model_folder(options.model)
        self.config = checkpoint.read_config(self.folder)
        if beyond := self.config.beyond_gpt2:
            raise UserError(
                f"--model {options.model}: has {beyond[0]}; give a run of --attention mha"
            )
        self.weights = checkpoint.read_weights(self.folder, self.config)
        tokenizer = get_tokenizer(self.run.tokenizer, self.run.bpe_dir)
        tokens = corpus.tokenize(corpus.read_documents(self.run.data), tokenizer)
        cut = training_part(len(tokens), self.run.val_fraction)
        self.training, held_out = tokens[:cut], tokens[cut:]
        assert self.config.vocab_size
        windows = TokenWindows(held_out, self.run.context, 0, self.config.vocab_size)
        self.batches = list(windows.sequential(16, math.ceil(options.held_out_windows / 16)))
        self.text = Text(self.run.data, tokenizer.fast_tokenizer(), self.run.context)
        options.work.mkdir(parents=True, exist_ok=True)
        self.base = self.window_losses(self.config, self.weights)

    def window_losses(self, config: ModelConfig, weights: Weights) -> np.ndarray:
        """Mean loss of every held-out window, nats per token."""
        model, losses = build_model(config, weights, torch.device("cpu")), []
        with torch.inference_mode():
            for x, y in self.batches:
                logits = model(torch.tensor(x), use_cache=False).logits.transpose(1, 2)
                losses.append(
                    F.cross_entropy(logits, torch.tensor(y).long(), reduction="none").mean(1)
                )
        return torch.cat(losses).double().numpy()

    def measure(self) -> list[Row]:
        o, rows = self.options, []
        D = self.config.n_embd
        cells = [
            Cell(max(1, round(f * D)), m, budget)
            for f in o.fractions
            for m in o.methods
            for budget in (False, True)
        ]
        cells = [c for c in cells if c.rank < D or not c.budget]
        heal = [
            Cell(max(1, round(f * D)), o.heal_method, o.heal_budget, h, teacher)
            for f in o.heal_fractions for h in o.heal if h for teacher in (False, True)
        ]  # fmt: skip
        # What the same tokens do to the MHA model itself, which could go on learning too.
        heal += [Cell(D, UNCONVERTED, heal=h) for h in o.heal if h]
        for cell in cells + heal:
            done = o.work / f"{cell.name}.json"
            if not done.is_file():
                converted = self._converted(cell)
                config, weights = self._healed(cell, *converted) if cell.heal else converted
                row = {
                    **dataclasses.asdict(cell),
                    **compare(self.window_losses(config, weights), self.base),
                }
                files.write_text(done, json.dumps(row))
            rows.append(json.loads(done.read_text()))
            print(line(rows[-1]), flush=True)
        return rows

    @functools.cached_property
    def moments(self) -> list[Moments]:
        """Of the training text, with gradients."""
        model = build_model(self.config, self.weights, torch.device("cpu"))
        return collect_moments(model, self.text, self.options.calibration_tokens, True, Console())[
            0
        ]

    def _converted(self, cell: Cell) -> tuple[ModelConfig, Weights]:
        if cell.method == UNCONVERTED:
            return self.config, self.weights
        method = next(m for m in METHODS if m == cell.method)
        moments = None if method == "svd" else self.moments
        layers = list(factorise(self.config, self.weights, method, moments))
        ranks = (
            share_ranks(layers, cell.rank, method)
            if cell.budget
            else [cell.rank] * self.config.n_layer
        )
        return assemble(self.config, self.weights, ranks, layers, moments)

    def _healed(
        self, cell: Cell, config: ModelConfig, weights: Weights
    ) -> tuple[ModelConfig, Weights]:
        assert self.config.vocab_size
        size = self.options.heal_batch_size
        steps = max(
            1, round(cell.heal * self.run.steps * self.run.step_tokens / (size * self.run.context))
        )
        settings = dataclasses.replace(
            self.run,
            model=config,
            steps=steps,
            learning_rate=self.options.heal_learning_rate,
            batch_size=size,
            grad_accum_steps=1,
            warmup_steps=max(1, steps // 10),
            weight_decay=0.0,
        )
        teacher = None
        if cell.teacher:
            settings = dataclasses.replace(
                settings, teacher="--model", teacher_weight=1.0, teacher_temperature=1.0
            )
            teacher = Teacher(self.config, self.weights, len(self.text.tokenizer))
        session = get_backend("torch", "cpu").train_session(settings, Start(weights), teacher)
        # Another seed than the run's: other windows and another order.
        data = TokenWindows(
            self.training, self.run.context, self.run.seed + 1, self.config.vocab_size
        )
        for step in range(steps):
            session.step(step, learning_rate(settings, step), [data.batch(step, size)])
        return config, session.weights()


def compare(losses: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Perplexity, and its change against the base in per cent with the standard error of the paired
    difference."""
    paired = losses - base
    change, error = float(paired.mean()), float(paired.std(ddof=1) / math.sqrt(len(paired)))
    perplexity = math.exp(losses.mean())
    return {
        "perplexity": perplexity,
        "change": 100 * math.expm1(change),
        "stderr": 100 * math.exp(change) * error,
    }


def line(row: Row) -> str:
    """A row of the Markdown table."""
    healed = f"{row['heal']:.0%}{', teacher' if row['teacher'] else ''}" if row["heal"] else "-"
    method = f"{row['method']}{', budget' if row['budget'] else ''}"
    return (
        f"| {row['rank']} | {method} | {healed} | {row['perplexity']:.4f} "
        f"| {row['change']:+.2f} ± {row['stderr']:.2f} |"
    )


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """What was trained, calibrated and healed, and the table."""
    m = found["model"]
    return [
        "",
        f"The model: {m['n_layer']} layers, {m['n_head']} heads, {m['n_embd']} wide, context "
        f"{m['context']}, trained on {m['tokens']:,} tokens ({m['tokenizer']}); perplexity "
        f"{found['mha_perplexity']:.4f} on {m['held_out_windows']:,} held-out windows. Calibrated "
        f"on {found['settings']['calibration_tokens']:,} tokens of its training text. Healed: so "
        "much of the training tokens, with the text's cross-entropy or the divergence from the MHA "
        "teacher alone; the MHA model itself with the same tokens for comparison. Change: "
        "perplexity against the MHA model in per cent, ± the standard error of the paired "
        "difference over windows.",
        "",
        "| rank | method | healed | perplexity | change, % |",
        "|---|---|---|---|---|",
        *map(line, found["cells"]),
    ]


def figures(found: Document) -> dict[str, Any]:
    """Change of perplexity against rank, a line a method."""
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    series: dict[str, list[Row]] = {}
    for row in found["cells"]:
        healed = (
            f", healed {row['heal']:.0%}{' with teacher' if row['teacher'] else ''}"
            if row["heal"]
            else ""
        )
        if row["method"] == UNCONVERTED:
            continue
        series.setdefault(
            row["method"] + (", budget" if row["budget"] else "") + healed, []
        ).append(row)
    for label, points in series.items():
        x, y = ([p[key] for p in points] for key in ("rank", "change"))
        axes.errorbar(x, y, [p["stderr"] for p in points], marker="o", ms=3, lw=1, label=label)
    axes.set(
        xlabel="rank of the latent",
        ylabel="change of perplexity, %",
        title=f"n_embd = {found['model']['n_embd']}",
    )
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="gray", lw=0.5)
    axes.legend(fontsize=7)
    figure.tight_layout()
    return {"convert": figure}


REPORT = Report("convert", "MHA made latent: perplexity by rank and method", body, figures)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    options = cli.parse(ConvertBench, argv, PROG)
    bench = Bench(options)
    rows = bench.measure()
    shape, run = bench.config, bench.run
    model = {
        **{name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd")},
        "context": run.context,
        "tokens": run.steps * run.step_tokens,
        "tokenizer": run.tokenizer,
        "held_out_windows": len(bench.base),
    }
    measured: dict[str, Any] = {"mha_perplexity": math.exp(bench.base.mean()), "model": model}
    measured["cells"] = rows
    found = document("bench.convert_mla", PROG, argv, options, {"torch": "cpu"}, **measured)
    publish(REPORT, found, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
