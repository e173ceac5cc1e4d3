"""MLX and PyTorch side by side: forward, first token, decoding and training, MLA against GPT-2.

    python bench/compare_backends.py --quick
    python bench/compare_backends.py --out bench/results/my-mac

Method: the same weights go into both backends, and their logits must agree before anything is
timed (float32 is not TF32 in either: MLX_ENABLE_TF32 is 0 unless the environment sets it). One
subject is in memory at a time: each is loaded, warmed up until two runs agree within a tenth (the
first, cold run is kept apart) and timed, in order for the first half of the repetitions and
backwards for the second, so that drift of the machine hits all alike. Figures are the median,
smallest and largest of the repetitions.

Decoding is timed by the loop that `generate` has: in MLX the next step is under way while a token
is handed out (`waited_ms` has the same steps one by one), in PyTorch every token is waited for.

In pieces: `--minutes 8 --resume` ends with exit code 75 after the measurement that is under way
when 8 minutes have passed, and with 0 when nothing is missing:

    until python bench/compare_backends.py --out DIR --resume --minutes 8; do sleep 1; done

Writes results.json after every measurement, and at the end report.md and plots. results.json:
{"command", "machine": {...}, "settings": {...}, "baseline": the model that ratios are against
(absent without MHA), "parity": [{"weights", "backend", "model", "against",
"largest_logit_difference", "allowed", "positions", "ok"}], "rows": [...]}, a row being one
measurement of one subject: measure (forward, first token, decoding, training), backend, model,
cache (latent, materialized, none or null), batch, context (tokens), status ("ok" or why not),
tokens_per_sec: {median, min, max, cold, values}, ms (of the whole call, median), waited_ms (or
null), peak_bytes (most that the subject held while it was timed: its weights, its cache and what
the call needs, nothing else that the process has; null where the framework does not say),
cache_bytes (with the room it keeps), cache_bytes_per_token, weight_bytes, flops and bytes (that one
call must compute and move), rates: {"matmul_flops", "memory_bytes"} (the best that the device
showed just before and just after, a second), roofline (the time that flops and bytes need at these
rates, as a share of the time taken).
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

if not __package__:  # started as a file, which puts this folder on the path instead of its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from bench import subjects
from bench.compare_report import REPORT
from bench.harness import Report, Row, document, markdown, rewrite
from bench.rows import Results
from bench.subjects import costs
from bench.subjects.candidates import Candidate, Models
from bench.subjects.contract import Subject, Timed
from bench.timing import Case, time_cases
from mlx_mla import cli
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig, TrainConfig
from mlx_mla.model.estimate import forward_flops_per_token

PROG = "python bench/compare_backends.py"
PARITY = {"float32": 1e-3, "bfloat16": 0.5}
ORIGINAL = "original's decoding"
FRESH = 10.0  # seconds
UNFINISHED = 75  # EX_TEMPFAIL: nothing is wrong, call again


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
    minutes: Optional[float] = None
    """Begin no measurement after so many minutes; the exit code is then 75. None: no limit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    settings = cli.parse(Compare, argv, PROG)
    _check(settings)
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first product
    devices = dict.fromkeys(settings.backends, settings.device)
    found = document("bench.compare_report", PROG, argv, settings, devices)
    path = settings.out and settings.out / "results.json"
    results = Results(found, path, settings.resume)
    bench = Bench(settings, results)
    measures = {
        "forward": bench.forward,
        "first-token": bench.first_token,
        "decoding": bench.decoding,
        "training": bench.training,
    }
    return take(bench, [measures[name] for name in settings.measures], REPORT, path)


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
    if s.minutes is not None and s.minutes <= 0:
        raise UserError("--minutes must be above 0")
    if s.minutes is not None and s.out is None:
        raise UserError("--minutes needs --out, the folder that --resume goes on with")
    if min(s.batch) < 1 or min(s.context) < 1:
        raise UserError("--batch and --context must be at least 1")
    if s.resume and s.out is None:
        raise UserError("--resume needs --out, the folder with the rows to keep")
    if s.out is not None and (s.out / "results.json").exists() and not s.resume:
        raise UserError(
            f"{s.out}: holds results; add --resume to complete them, or give --out a new name"
        )


class OutOfTime(Exception):
    """--minutes are over, and something is left to measure."""


class Bench:
    """Holds the candidates, and measures.

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
        self._ends = settings.minutes and time.monotonic() + 60 * settings.minutes
        self.models = Models(settings.models, settings.quick, n_positions)
        self.configs = self.models.configs
        self.candidates = self.models.candidates(
            settings.backends, settings.dtype, settings.device, references
        )
        self.failed: set[tuple[str, str]] = set()
        self.device_kind: dict[str, str] = {}
        self._rates: dict[str, tuple[float, dict[str, float]]] = {}
        if self.models.baseline is not None:
            results.document.setdefault("baseline", self.models.baseline)

    def parity(self) -> None:
        """Compare logits of every subject with the first of the same weights; those that differ are
        not timed."""
        found = []
        for name, config in self.configs.items():
            ids = _ids(2, min(48, config.n_positions), config)
            expected: np.ndarray | None = None
            first = ""
            for c in (c for c in self.candidates if c.weights == name):
                subject = c.load()
                self.device_kind[c.backend] = subject.device_kind
                logits = subject.logits(ids)
                del subject
                subjects.release(c.backend)
                if expected is None:
                    expected, first = logits, f"{c.backend} {c.model}"
                    continue
                difference, allowed = float(np.abs(logits - expected).max()), PARITY[self.s.dtype]
                found.append({
                    "weights": name, "backend": c.backend, "model": c.model, "against": first,
                    "largest_logit_difference": difference, "allowed": allowed,
                    "positions": ids.size, "ok": difference <= allowed,
                })  # fmt: skip
                print(
                    f"parity {c.backend} {c.model}: largest logit difference {difference:.2g}",
                    flush=True,
                )
                if not found[-1]["ok"]:
                    self.failed.add((c.backend, c.model))
        self.results.set_parity(found)

    def rates(self, backend: str) -> dict[str, float]:
        """What the device does at best now; a rate of the last seconds still counts."""
        last = self._rates.get(backend)
        if last is None or time.monotonic() - last[0] > FRESH:
            found = subjects.rates(
                backend, self.s.dtype, self.s.device, 1024 if self.s.quick else 8192
            )
            rates = dict(zip(("matmul_flops", "memory_bytes"), found, strict=True))
            last = self._rates[backend] = time.monotonic(), rates
        return last[1]

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
                    run: Any = lambda subject, i=ids: subject.forward(i)  # noqa: E731
                    cases.append(self._case("forward", s, None, batch, length, run, flops))
            self._measure(cases)

    def first_token(self) -> None:
        """A prompt into an empty cache, and the token after it."""
        for context in self.s.context:
            context = context // 16 if self.s.quick else context
            cases = []
            for s, kind in self._decoders():
                if context < s.config.n_positions:
                    flops = costs.prompt_flops(s.config, context)
                    ids = _ids(1, context, s.config)[0]
                    run: Any = lambda subject, i=ids, k=kind: subject.first_token(i, k)  # noqa: E731
                    cases.append(self._case("first token", s, kind, 1, context, run, flops))
            self._measure(cases)

    def decoding(self) -> None:
        """Greedy steps after a context; the original's way at batch 1 alone."""
        for batch in self.s.batch:
            for context in self.s.context:
                context = context // 16 if self.s.quick else context
                cases = []
                for s, kind in self._decoders():
                    steps = decode_steps(batch, kind)
                    if context + steps + 2 > s.config.n_positions or (kind == "none" and batch > 1):
                        continue
                    flops: float
                    if kind == "none":
                        flops = batch * context * forward_flops_per_token(s.config, context)
                    else:
                        flops = batch * costs.decode_flops(s.config, kind, context)
                    run = functools.partial(decode, batch, context, steps, kind)
                    cases.append(
                        self._case("decoding", s, kind, batch, context, run, steps * flops, steps)
                    )
                self._measure(cases)

    def training(self) -> None:
        """One optimiser step, one session in memory at a time."""
        length = 32 if self.s.quick else 512
        batch = self.s.train_batch
        for backend in self.s.backends:
            cases = []
            for s in self._timed():
                outside = s.model not in self.configs
                if s.backend != backend or outside or length > s.config.n_positions:
                    continue
                train = dataclasses.replace(
                    TrainConfig(dtype=self.s.dtype, model=s.config),
                    batch_size=batch,
                    seq_len=length,
                )
                load = functools.partial(s.trainer, train, self.s.device)
                ids = _ids(batch, length + 1, s.config)
                flops = 3 * batch * length * forward_flops_per_token(s.config, length)
                run: Any = lambda trainer, i=ids: trainer.step(i[:, :-1], i[:, 1:])  # noqa: E731
                case = self._case("training", s, None, batch, length, run, flops)
                cases.append(dataclasses.replace(case, load=load))
            self._measure(cases)

    def _timed(self) -> list[Candidate]:
        return [s for s in self.candidates if (s.backend, s.model) not in self.failed]

    def _decoders(self) -> list[tuple[Candidate, str]]:
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

    def _key(self, measure: str, s: Candidate, kind: str | None, batch: int, context: int) -> Row:
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
        s: Candidate,
        kind: str | None,
        batch: int,
        context: int,
        run: Callable[[Any], Any],
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
        return Case(key, s.load, run, tokens, flops, moved, sizes)

    def _measure(self, cases: list[Case]) -> None:
        """Time the cases that have no row yet, and what the device does at best beside them."""
        missing = [c for c in cases if not self.results.has(**c.key)]
        if not missing:
            return
        if self._ends and time.monotonic() > self._ends:
            raise OutOfTime
        backends = dict.fromkeys(c.key["backend"] for c in missing)
        before = {b: self.rates(b) for b in backends}
        rows = time_cases(missing, self.s.repetitions)
        after = {b: self.rates(b) for b in backends}
        for row in rows:
            b = row["backend"]
            row["rates"] = {k: max(rate, after[b][k]) for k, rate in before[b].items()}
        self.results.add(rows)


def take(
    bench: Bench, measures: Sequence[Callable[[], None]], report: Report, path: Path | None
) -> int:
    """Parity, then the measures, as far as --minutes allow, then the report; returns the exit
    code."""
    bench.parity()
    try:
        for measure in measures:
            measure()
        code = 0
    except OutOfTime:
        code = UNFINISHED
    bench.results.save()
    print(markdown(report, bench.results.document, {}))
    if path:
        rewrite(report, bench.results.document, path)
    if code:
        print("--minutes are over: the same command with --resume goes on", file=sys.stderr)
    return code


def decode_steps(batch: int, kind: str) -> int:
    """Steps that are timed at once; few where each takes long."""
    return 8 if batch == 1 and kind != "none" else 2


def decode(batch: int, context: int, steps: int, kind: str, subject: Subject) -> Timed:
    """`Subject.decode` with the subject last, as what a case runs."""
    return subject.decode(batch, context, steps, kind)


def _ids(batch: int, length: int, config: ModelConfig) -> np.ndarray:
    return (
        np.random.default_rng(1)
        .integers(0, config.vocab_size or 1, (batch, length))
        .astype(np.int32)
    )


if __name__ == "__main__":
    sys.exit(main())
