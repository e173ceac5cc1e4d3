"""MLX and PyTorch side by side: forward, first token, decoding and training, MLA against GPT-2.

    python bench/compare_backends.py --quick
    python bench/compare_backends.py --out bench/results/my-mac

Method: the same weights go into both backends, and their logits must agree before anything is
timed (float32 is not TF32 in either: MLX_ENABLE_TF32 is 0 unless the environment sets it); every
subject is warmed up until two runs agree within a tenth (the first, cold run is kept apart); then
all subjects of a measurement take turns, so that drift of the machine hits them alike. Figures are
the median, smallest and largest of the repetitions.

Writes results.json after every measurement, and at the end report.md and plots. results.json:
{"command", "machine": {...}, "settings": {...}, "baseline": the model that ratios are against
(absent without MHA), "rates": {backend: {"matmul_flops", "memory_bytes"}}, "rows": [...]}, a row
being one measurement of one subject: measure (forward, first token, decoding, training), backend,
model, cache (latent, materialized, none or null), batch, context (tokens), status ("ok" or why
not), tokens_per_sec: {median, min, max, cold, values}, ms (of the whole call, median),
peak_memory_bytes (null where the framework does not say), cache_bytes, cache_bytes_per_token,
weight_bytes, flops and bytes (that one call must compute and move), roofline (the time that these
need at the rates, as a share of the time taken). The rates are the best that the device showed at
the beginning and at the end of every run into the file.
"""

import dataclasses
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

if not __package__:  # started as a file, which puts this folder on the path instead of its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from bench import subjects
from bench.compare_report import REPORT
from bench.harness import Row, document, markdown, rewrite
from bench.rows import Results
from bench.subjects import costs
from bench.subjects.contract import Subject, Weights
from bench.timing import Case, time_cases
from mlx_mla import checkpoint, cli
from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.errors import UserError
from mlx_mla.estimate import forward_flops_per_token
from mlx_mla.presets import PRESETS, preset
from mlx_mla.weights import initial_weights

PROG = "python bench/compare_backends.py"
PARITY = {"float32": 1e-3, "bfloat16": 0.5}
ORIGINAL = "original's decoding"


@dataclasses.dataclass(kw_only=True)
class Compare:
    """Set MLX and PyTorch side by side on this machine."""

    models: tuple[str, ...] = ("gpt2-124m", "mla-124m", "mla-124m-r256", "mla-124m-r128")
    """Presets, or model folders. Ratios are against the first one with multi-head attention."""
    backends: tuple[Literal["mlx", "torch"], ...] = ("mlx", "torch")
    """Frameworks to time."""
    device: Literal["auto", "cpu", "gpu", "mps", "cuda"] = "auto"
    """Device of both; "auto" takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and computation."""
    measures: tuple[Literal["forward", "first-token", "decoding", "training"], ...] = (
        "forward", "first-token", "decoding", "training",
    )  # fmt: skip
    """What to measure."""
    batch: tuple[int, ...] = (1, 8, 32)
    """Batch sizes of decoding."""
    context: tuple[int, ...] = (64, 512, 1000)
    """Prompt lengths of the first token, and contexts of decoding."""
    forward_batch: int = 8
    """Batch of the forward pass at 512 tokens (8 is the original's setting); half of it at 1024."""
    train_batch: int = 1
    """Batch of the training step, at 512 tokens."""
    repetitions: int = 5
    """Timed runs of every subject."""
    quick: bool = False
    """Small models of the same kinds and short contexts: every path in under 3 minutes."""
    out: Optional[Path] = None
    """Folder for results.json, report.md and plots. None: only print."""
    resume: bool = False
    """Keep the rows that --out has already, and measure the rest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(Compare, argv, PROG)
    _check(settings)
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first product
    found = document("bench.compare_report", PROG, argv, settings, settings.backends)
    path = settings.out and settings.out / "results.json"
    results = Results(found, path, settings.resume)
    bench = Bench(settings, results)
    bench.parity()
    bench.rates()
    for measure in settings.measures:
        {
            "forward": bench.forward,
            "first-token": bench.first_token,
            "decoding": bench.decoding,
            "training": bench.training,
        }[measure]()
    bench.rates()
    results.save()
    print(markdown(REPORT, results.document, {}))
    if path:
        rewrite(REPORT, results.document, path)
    return 0


def _check(s: Compare) -> None:
    if not s.models or not s.backends or not s.measures or not s.batch or not s.context:
        raise UserError(
            "--models, --backends, --measures, --batch and --context need at least one value each"
        )
    for name in ("forward_batch", "train_batch", "repetitions"):
        if getattr(s, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} must be at least 1, not {getattr(s, name)}"
            )
    if min(s.batch) < 1 or min(s.context) < 1:
        raise UserError("--batch and --context must be at least 1")
    if s.resume and s.out is None:
        raise UserError("--resume needs --out, the folder with the rows to keep")
    if s.out is not None and (s.out / "results.json").exists() and not s.resume:
        raise UserError(
            f"{s.out}: holds results; add --resume to complete them, or give --out a new name"
        )


class Bench:
    """Holds the models, and measures.

    Args:
        n_positions: Position table of the presets; None: their own.
        references: Whether mlx-lm's and transformers' GPT-2 run beside ours.
    """

    def __init__(
        self,
        settings: Any,
        results: Results,
        n_positions: int | None = None,
        references: bool = True,
    ):
        self.s, self.results = settings, results
        self.configs: dict[str, ModelConfig] = {}
        self.subjects: list[Subject] = []
        self.failed: set[tuple[str, str]] = set()
        for name in settings.models:
            config, weights = _model(name, settings.quick, n_positions)
            self.configs[name] = config
            how = (config, weights, settings.dtype, settings.device)
            self.subjects += [subjects.load(backend, name, *how) for backend in settings.backends]
            if not config.kind.beyond_gpt2 and all(
                c.kind.beyond_gpt2 for c in list(self.configs.values())[:-1]
            ):
                results.document.setdefault("baseline", name)
                if references:
                    self.subjects += [
                        subjects.load_reference(backend, *how) for backend in settings.backends
                    ]

    def rates(self) -> None:
        """Measure what the device does at best; better figures replace those that the document
        has."""
        for backend in self.s.backends:
            best = self.results.document["rates"].setdefault(
                backend, {"matmul_flops": 0.0, "memory_bytes": 0.0}
            )
            for key, rate in zip(
                best, subjects.rates(backend, self.s.dtype, self.s.device), strict=True
            ):
                best[key] = max(best[key], rate)

    def parity(self) -> None:
        """Compare logits of every subject with the first of the same weights; those that differ are
        not timed."""
        for config in self.configs.values():
            same = [s for s in self.subjects if s.config is config]  # references, too
            ids = np.random.default_rng(0).integers(
                0, config.vocab_size, (2, min(48, config.n_positions))
            )
            expected = same[0].logits(ids.astype(np.int32))
            for subject in same[1:]:
                difference = float(np.abs(subject.logits(ids.astype(np.int32)) - expected).max())
                ok = difference <= PARITY[self.s.dtype]
                print(
                    f"parity {subject.backend} {subject.model}: largest logit difference "
                    f"{difference:.2g}",
                    flush=True,
                )
                if not ok:
                    self.failed.add((subject.backend, subject.model))
                    row = {"measure": "parity", "backend": subject.backend, "model": subject.model}
                    status = f"logits differ by {difference:.3g}; not timed"
                    if not self.results.has(**row):
                        self.results.add([{**row, "status": status}])

    def forward(self) -> None:
        """Logits of every position, no cache built by anyone."""
        for batch, length in (
            (self.s.forward_batch, 512),
            (max(1, self.s.forward_batch // 2), 1024),
        ):
            length = length // 16 if self.s.quick else length
            cases = []
            for s in self._timed():
                if length <= s.config.n_positions:
                    flops = float(batch * length * forward_flops_per_token(s.config, length))
                    ids = _ids(batch, length, s.config)
                    run: Any = lambda s=s, i=ids: s.forward(i)  # noqa: E731
                    cases.append(self._case("forward", s, None, batch, length, run, flops))
            self._measure(cases)

    def first_token(self) -> None:
        """A prompt into an empty cache, and the token after it."""
        for context in self.s.context:
            context = context // 16 if self.s.quick else context
            cases = []
            for s, kind in self._decoders():
                if context < s.config.n_positions:
                    flops = context * forward_flops_per_token(s.config, context)
                    ids = _ids(1, context, s.config)[0]
                    run: Any = lambda s=s, i=ids, k=kind: s.first_token(i, k)  # noqa: E731
                    cases.append(self._case("first token", s, kind, 1, context, run, flops))
            self._measure(cases)

    def decoding(self) -> None:
        """Greedy steps after a context, each waiting for the one before; the original's way at
        batch 1 alone."""
        for batch in self.s.batch:
            for context in self.s.context:
                context = context // 16 if self.s.quick else context
                steps = 8 if batch == 1 else 2
                cases = []
                for s, kind in self._decoders():
                    if context + steps > s.config.n_positions or (kind == "none" and batch > 1):
                        continue
                    flops: float
                    if kind == "none":
                        flops = batch * context * forward_flops_per_token(s.config, context)
                    else:
                        flops = batch * costs.decode_flops(s.config, kind, context)
                    run: Any = lambda s=s, k=kind, b=batch, c=context, n=steps: s.decode(b, c, n, k)  # noqa: E731
                    cases.append(
                        self._case("decoding", s, kind, batch, context, run, steps * flops, steps)
                    )
                self._measure(cases)

    def training(self) -> None:
        """One optimiser step; a backend at a time, since each holds weights, gradients and
        moments."""
        length = 32 if self.s.quick else 512
        for backend in self.s.backends:
            cases = []
            for s in self._timed():
                if (
                    s.backend != backend
                    or s.model not in self.configs
                    or length > s.config.n_positions
                ):
                    continue
                key = self._key("training", s, None, self.s.train_batch, length)
                if self.results.has(**key):
                    continue
                train = dataclasses.replace(
                    TrainConfig(dtype=self.s.dtype, model=s.config),
                    batch_size=self.s.train_batch,
                    seq_len=length,
                )
                # Made by the first call, so that running out of memory marks this row alone.
                step = functools.cache(lambda s=s, train=train: s.train_step(train))
                ids = _ids(self.s.train_batch, length + 1, s.config)
                flops = 3 * self.s.train_batch * length * forward_flops_per_token(s.config, length)
                run: Any = lambda step=step, i=ids: step()(i[:, :-1], i[:, 1:])  # noqa: E731
                cases.append(
                    self._case("training", s, None, self.s.train_batch, length, run, flops)
                )
            self._measure(cases)
            del cases
            gc.collect()

    def _timed(self) -> list[Subject]:
        return [s for s in self.subjects if (s.backend, s.model) not in self.failed]

    def _decoders(self) -> list[tuple[Subject, str]]:
        """Subjects with each kind of cache; the original's way, without one, in PyTorch for its own
        shape."""
        pairs = []
        for s in self._timed():
            kinds = ["latent", "materialized"] if s.config.kind.latent_widths else ["materialized"]
            pairs += [(s, kind) for kind in kinds]
        first_latent = next((n for n, c in self.configs.items() if c.kind.latent_widths), None)
        pairs += [
            (s, "none") for s in self._timed() if s.backend == "torch" and s.model == first_latent
        ]
        return pairs

    def _key(self, measure: str, s: Subject, kind: str | None, batch: int, context: int) -> Row:
        model = f"{ORIGINAL} ({s.model})" if kind == "none" else s.model
        return {
            "measure": measure,
            "backend": s.backend,
            "model": model,
            "cache": kind,
            "batch": batch,
            "context": context,
        }

    def _case(
        self,
        measure: str,
        s: Subject,
        kind: str | None,
        batch: int,
        context: int,
        run: Callable[[], Any],
        flops: float,
        steps: int = 1,
    ) -> Case:
        weights = costs.weight_bytes(s.config, self.s.dtype)
        width = costs.cache_bytes(s.config, kind, self.s.dtype) if kind else None
        cached = (width or 0) * context * batch
        moved = steps * (weights + (cached if measure == "decoding" else 0))
        tokens = batch * (steps if measure == "decoding" else context)
        sizes = {"weight_bytes": weights, "cache_bytes_per_token": width}
        key = self._key(measure, s, kind, batch, context)
        return Case(key, run, tokens, flops, moved, s.peak_memory_bytes, sizes)

    def _measure(self, cases: list[Case]) -> None:
        """Time the cases that have no row yet, in turns."""
        missing = [c for c in cases if not self.results.has(**c.key)]
        self.results.add(time_cases(missing, self.s.repetitions))


def _model(name: str, quick: bool, n_positions: int | None = None) -> tuple[ModelConfig, Weights]:
    """A preset with random weights, or a model folder with its own; `quick` shrinks presets."""
    if name not in PRESETS and Path(name).exists():
        folder = checkpoint.model_folder(Path(name))
        config = checkpoint.read_config(folder)
        if checkpoint.is_quantized(folder):
            raise UserError(
                f"--models {name}: quantised by mlx-lm, which only MLX reads; compare the folder "
                "it was made from"
            )
        return config, checkpoint.read_weights(folder, config)
    config = preset(name).resolved().model
    if quick:
        rank = None if config.kv_lora_rank is None else max(8, config.kv_lora_rank // 8)
        small: dict[str, Any] = {"n_layer": 2, "n_head": 3, "n_embd": 96, "n_positions": 128}
        config = dataclasses.replace(
            preset(name).model, **small, vocab_size=512, kv_lora_rank=rank
        ).resolved()
    config = dataclasses.replace(config, n_positions=n_positions or config.n_positions)
    return config, initial_weights(config, 0)


def _ids(batch: int, length: int, config: ModelConfig) -> np.ndarray:
    return (
        np.random.default_rng(1)
        .integers(0, config.vocab_size or 1, (batch, length))
        .astype(np.int32)
    )


if __name__ == "__main__":
    sys.exit(main())
