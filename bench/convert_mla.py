"""What MLA costs a trained MHA model: perplexity by rank, with and without a calibration text,
before and after recovery fine-tuning.

    python -m bench convert --model RUN --out DIR [--resume]

RUN is a multi-head model trained on TEXT by `python -m mlx_mla.train`, for example

    python -m mlx_mla.train --attention mha --n-layer 4 --n-head 4 --n-embd 256 \\
        --n-positions 128 --batch-size 16 --steps 3200 --warmup-steps 100 --learning-rate 3e-3 \\
        --initializer-range 0.06 --backend torch --data TEXT --out RUN

Calibration and fine-tuning read what the model was trained on; perplexity is of the part it held
out. Every loss is compared window by window with the MHA model's, so the difference has a standard
error of its own: both see the same windows, and the windows' own spread cancels.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from bench.harness import Document, Picture, Results, Resumable, Row
from bench.rows import Figure, Positive, Signed, Whole, record, rows
from convert.calibration import Text
from convert.to_mla import Calibration, Rank, with_text, without_text
from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Start, Teacher
from mlx_mla.backends.torch.load import build_model
from mlx_mla.data.dataset import TrainingData
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.display import markdown_table
from mlx_mla.errors import UserError
from mlx_mla.fields import PositiveInt, fraction, not_negative, positive
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.schedule import learning_rate
from mlx_mla.training.run_folder import run_config

Share = Annotated[float, fraction(above_0=True)]
FITTED, BLIND = "fitted to a text", "without a text"
UNCONVERTED = "the MHA model"
CELL = {"rank": Whole, "method": str, "budget": bool, "heal": Figure, "teacher": bool}
"""A measured model: its rank, which is an average over the layers with `budget`; and the share of
the training tokens it was fine-tuned on ("heal"), with the text or the teacher as target."""
ROWS = rows({**CELL, "perplexity": Figure, "change": Signed, "stderr": Figure})
SIZES = ("n_layer", "n_head", "n_embd", "context", "tokens", "held_out_windows")
MODEL = record({**dict.fromkeys(SIZES, Whole), "tokenizer": str})
Weights = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class Convert(Resumable):
    """Measure held-out perplexity of an MHA model converted to MLA, by rank, and after recovery
    fine-tuning."""

    model: Path
    """Run folder of the multi-head model."""
    fractions: tuple[Share, ...] = (1, 0.75, 0.5, 1 / 3, 1 / 6, 1 / 12)
    """Ranks to measure, as shares of n_embd."""
    calibration_tokens: PositiveInt = 131072
    """Tokens of the training text to calibrate on."""
    held_out_windows: Annotated[int, not_negative(10**9)] = 512
    """Windows of the held-out text, spread evenly. 0: all."""
    finetune: tuple[Annotated[float, fraction()], ...] = (0.01, 0.05)
    """Shares of the training tokens to fine-tune on; none: --finetune 0."""
    finetune_fractions: tuple[Share, ...] = (0.5, 1 / 3, 1 / 6)
    """Ranks to fine-tune, as shares of n_embd."""
    finetune_budget: bool = True
    """Whether their rank is an average, shared out among the layers."""
    finetune_learning_rate: Annotated[float, positive(1)] = 3e-5
    """Highest learning rate of fine-tuning."""
    finetune_batch_size: PositiveInt = 4
    """Sequences in a step of fine-tuning: few, since few tokens must give many steps."""

    name = "convert"
    title = "MHA converted to MLA: perplexity by rank"
    stored: ClassVar = {"cells": ROWS, "model": MODEL, "mha_perplexity": Positive}
    devices: ClassVar = {"torch": "cpu"}
    same: ClassVar[Sequence[str]] = ("model", "calibration_tokens", "held_out_windows")

    def measure(self, results: Results) -> None:
        bench = Bench(self)
        losses = bench.window_losses(bench.config, bench.weights)
        shape, run = bench.config, bench.run
        model = {name: getattr(shape, name) for name in ("n_layer", "n_head", "n_embd")} | {
            "context": run.context, "tokens": run.total_tokens,
            "tokenizer": run.tokenizer, "held_out_windows": len(losses),
        }  # fmt: skip
        results.add(mha_perplexity=math.exp(losses.mean()), model=model)
        for cell in bench.cells():
            if not results.has("cells", **cell):
                results.begin()
                row = {**cell, **compare(bench.window_losses(*bench.converted(cell)), losses)}
                print(*columns(row), sep="  ", flush=True)
                results.add(row, to="cells")

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        m = found["model"]
        return [
            "",
            f"The model: {m['n_layer']} layers, {m['n_head']} heads, {m['n_embd']} wide, context "
            f"{m['context']}, trained on {m['tokens']:,} tokens ({m['tokenizer']}); perplexity "
            f"{found['mha_perplexity']:.4f} on {m['held_out_windows']:,} held-out windows. "
            f"Calibrated on {found['settings']['calibration_tokens']:,} tokens of its training "
            "text. Fine-tuned: the share of the training tokens, with the text's cross-entropy or "
            "the divergence from the MHA teacher alone; the MHA model itself with the same tokens "
            "for comparison. Change: perplexity against the MHA model in per cent, ± the standard "
            "error of the paired difference over windows.",
            "",
            *markdown_table(COLUMNS, [columns(row) for row in found["cells"]]),
        ]

    @staticmethod
    def figures(found: Document) -> dict[str, Picture]:
        """Change of perplexity against rank, a line a way to convert."""
        series: dict[str, list[Row]] = {}
        for row in found["cells"]:
            if row["method"] != UNCONVERTED:
                _, method, tuned, *_ = columns(row)
                label = method if tuned == "-" else f"{method}, fine-tuned {tuned}"
                series.setdefault(label, []).append(row)

        def paint(figure: Any) -> None:
            axes = figure.subplots()
            for label, points in series.items():
                x, y, errors = ([p[key] for p in points] for key in ("rank", "change", "stderr"))
                axes.errorbar(x, y, errors, marker="o", ms=3, lw=1, label=label)
            axes.set(xlabel="rank of the latent", ylabel="change of perplexity, %")
            axes.set_title(f"n_embd = {found['model']['n_embd']}")
            axes.set_yscale("symlog", linthresh=0.1)
            axes.axhline(0, color="gray", lw=0.5)
            axes.legend(fontsize=7)
            figure.tight_layout()

        return {"convert": Picture(paint, (7, 4.5))} if series else {}


class Bench:
    """The source model and its text."""

    def __init__(self, options: Convert):
        self.options = options
        folder = checkpoint.ModelFolder(checkpoint.model_folder(options.model))
        self.run = run_config(options.model)
        self.config = folder.config
        if beyond := self.config.beyond_gpt2:
            raise UserError(
                f"--model {options.model}: has {beyond[0]}; give a run of --attention mha"
            )
        self.weights = folder.weights()
        tokenizer = get_tokenizer(self.run.tokenizer, self.run.bpe_dir)
        # Another seed than the run's: fine-tuning has other windows and another order.
        self._data = TrainingData(dataclasses.replace(self.run, seed=self.run.seed + 1), tokenizer)
        number = math.ceil(options.held_out_windows / 16)
        self._batches = list(self._data.val.sequential(16, number))
        self._text = Text(self.run.data, tokenizer.fast_tokenizer(), self.run.context)

    def window_losses(self, config: ModelConfig, weights: Weights) -> np.ndarray:
        """Mean loss of every held-out window, nats per token."""
        model, losses = build_model(config, weights, torch.device("cpu")), []
        with torch.inference_mode():
            for x, y in self._batches:
                logits = model(torch.tensor(x), use_cache=False).logits.transpose(1, 2)
                losses.append(
                    F.cross_entropy(logits, torch.tensor(y).long(), reduction="none").mean(1)
                )
        return torch.cat(losses).double().numpy()

    def cells(self) -> Iterator[Row]:
        """The cells to measure."""
        o, D = self.options, self.config.n_embd

        def cell(
            rank: float, method: str, budget: bool, heal: float = 0.0, teacher: bool = False
        ) -> Row:
            values = (max(1, round(rank * D)), method, budget, heal, teacher)
            return dict(zip(CELL, values, strict=True))

        for f in o.fractions:
            for m in (FITTED, BLIND):
                yield from (
                    cell(f, m, b) for b in ((False, True) if round(f * D) < D else (False,))
                )
        shares = [h for h in o.finetune if h]
        for f in o.finetune_fractions:
            for h in shares:
                for teacher in (False, True):
                    yield cell(f, FITTED, o.finetune_budget, h, teacher)
        # What the same tokens do to the MHA model itself, which could learn on, too.
        yield from (cell(1, UNCONVERTED, False, h) for h in shares)

    def converted(self, cell: Row) -> tuple[ModelConfig, Weights]:
        """The model of a cell."""
        if cell["method"] == UNCONVERTED:
            config, weights = self.config, self.weights
        else:
            rank = Rank(cell["rank"], cell["budget"])
            if cell["method"] == BLIND:
                config, weights, _ = without_text(self.config, self.weights, rank)
            else:
                device = torch.device("cpu")
                source = build_model(self.config, self.weights, device)
                calibration = Calibration(self._text, self.options.calibration_tokens, 0, device)
                config, weights, _ = with_text(
                    source, self.config, self.weights, rank, calibration, Console()
                )
        return config, self._finetuned(cell, config, weights) if cell["heal"] else weights

    def _finetuned(self, cell: Row, config: ModelConfig, weights: Weights) -> Weights:
        size, run = self.options.finetune_batch_size, self.run
        steps = max(1, round(cell["heal"] * run.total_tokens / (size * run.context)))
        settings = dataclasses.replace(
            run, model=config, steps=steps, learning_rate=self.options.finetune_learning_rate,
            batch_size=size, grad_accum_steps=1, warmup_steps=max(1, steps // 10), weight_decay=0.0,
        )  # fmt: skip
        teacher = None
        if cell["teacher"]:
            settings = dataclasses.replace(
                settings, teacher="--model", teacher_weight=1.0, teacher_temperature=1.0
            )
            teacher = Teacher(self.config, self.weights, len(self._text.tokenizer))
        session = get_backend("torch", "cpu").train_session(settings, Start(weights), teacher)
        for step in range(steps):
            session.step(step, learning_rate(settings, step), [self._data.train.batch(step, size)])
        return session.weights()


def compare(losses: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Perplexity, and its change against the base in per cent with the standard error of the paired
    difference."""
    paired = losses - base
    change, error = float(paired.mean()), float(paired.std(ddof=1) / math.sqrt(len(paired)))
    return {
        "perplexity": math.exp(losses.mean()),
        "change": 100 * math.expm1(change),
        "stderr": 100 * math.exp(change) * error,
    }


COLUMNS = ("rank", "conversion", "fine-tuned", "perplexity", "change, %")


def columns(row: Row) -> tuple[str, ...]:
    """The columns of a row."""
    tuned = f"{row['heal']:.0%}{', teacher' if row['teacher'] else ''}" if row["heal"] else "-"
    method = f"{row['method']}{', budget' if row['budget'] else ''}"
    change = f"{row['change']:+.2f} ± {row['stderr']:.2f}"
    return (str(row["rank"]), method, tuned, f"{row['perplexity']:.4f}", change)
