"""MLX and PyTorch side by side: forward, first token, decoding and training, MLA against GPT-2.

    python bench/compare_backends.py --quick
    python bench/compare_backends.py --out results/my-mac
    python -m bench core; python -m bench decode       # the same with other defaults

Method: the same weights go into both backends, and their logits must agree before anything is
timed. float32 is not TF32 in either: MLX_ENABLE_TF32 is 0 unless the environment sets it. One
subject is in memory at a time. Each is loaded, warmed up until two runs agree within a tenth (the
first, cold run is kept apart) and timed, in order for the first half of the repetitions and
backwards for the second, so that drift of the machine hits all equally. Figures are the median,
smallest and largest of the repetitions.

Decoding is timed by the loop that `generate` has. In MLX the next step is under way while a token
is handed out (`waited_ms` has the same steps one by one); in PyTorch every token is waited for.

In pieces: `--minutes 8 --resume` ends with exit code 75 after the measurement that is under way
when 8 minutes have passed, and with 0 when nothing is missing:

    until python bench/compare_backends.py --out DIR --resume --minutes 8; do sleep 1; done

Writes results.json after every measurement, and at the end report.md and pictures. results.json has
"command", "machine", "settings", "baseline" (the model that ratios are against; absent without
MHA), "parity" and "rows"; `bench/rows.py` documents the fields of both. A row is one measurement of
one subject, and fields that it has no value for are null.
"""

import dataclasses
import functools
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from unittest import mock

if not __package__:  # started as a file, which puts this folder on the path instead of its parent
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from bench.compare_pictures import figures
from bench.compare_report import body
from bench.harness import Results, Resumable, run
from bench.rows import EAGER, ORIGINAL, PLAIN, Parity, Rates, Row
from bench.subjects import Candidate, Models, framework
from bench.subjects.contract import Subject, Timed, Trainer, cache_bytes, call_flops
from bench.timing import Case, time_cases
from mlx_mla import cli
from mlx_mla.fields import PositiveInt, positive
from mlx_mla.model.config import BackendName, DeviceName, ModelConfig
from mlx_mla.model.estimate import BYTES
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import num_parameters

PROG = "python bench/compare_backends.py"
ALLOWED = {"float32": 1e-3, "bfloat16": 0.5}  # differences of logits
FRESH = 10.0  # seconds
CHUNKS = (2, 8, 32)
MLA_MODELS = ("mla-124m", "mla-124m-r256", "mla-124m-r128")
Measure = Literal["forward", "first-token", "decoding", "training", "loops", "chunks", "save"]
"""`loops` times other ways to train beside this project's: its eager step in MLX, and a plain
PyTorch loop. `chunks` are calls with several tokens on a latent cache."""


@dataclasses.dataclass(kw_only=True)
class Compare(Resumable):
    """Compare MLX and PyTorch on this machine."""

    models: tuple[str, ...] = ("gpt2-124m", *MLA_MODELS)
    """Presets, or model folders. Ratios are against the first one with multi-head attention."""
    backends: tuple[Literal["mlx", "torch"], ...] = ("mlx", "torch")
    """Frameworks to time."""
    device: Literal["auto", "cpu", "gpu", "mps", "cuda"] = "auto"
    """Device of both; "auto" takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and computation."""
    measures: tuple[Measure, ...] = ("forward", "first-token", "decoding", "training")
    """What to measure."""
    batch: tuple[PositiveInt, ...] = (1, 8, 32)
    """Batch sizes of decoding."""
    context: tuple[PositiveInt, ...] = (64, 512, 1000)
    """Prompt lengths of the first token, and contexts of decoding. Presets get a position table
    that is long enough."""
    max_cache_gb: Annotated[float, positive(1e6)] = 5.0
    """Leave out decoding whose cache is larger: the cache, the weights and a copy of one layer's
    cache must fit into memory (3 for 8 GB)."""
    forward_batch: PositiveInt = 8
    """Batch of the forward pass at 512 tokens (the original has 8); half as many at 1024."""
    train_batch: PositiveInt = 1
    """Batch of the training step, at 512 tokens, or as many as the model has positions."""
    references: bool = True
    """Time mlx-lm's and transformers' GPT-2 beside ours."""
    uncached: Literal["none", "first", "all"] = "first"
    """MLA models to decode without a cache as well, as the original does, at batch 1."""
    repetitions: PositiveInt = 5
    """Timed runs of every subject."""
    quick: bool = False
    """Small models of the same kinds and short contexts: every path in under 3 minutes."""

    name = "compare"
    title = "MLX and PyTorch side by side"
    stored: ClassVar = {"rows": list[Row], "parity": list[Parity], "baseline": str}
    same: ClassVar = ("dtype", "quick", "repetitions")
    body = staticmethod(body)
    figures = staticmethod(figures)

    @property
    def devices(self) -> dict[BackendName, DeviceName]:  # type: ignore[override]
        return dict.fromkeys(self.backends, self.device)

    def checked(self) -> Self:
        super().checked()
        os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first product
        return self

    def measure(self, results: Results) -> None:
        bench = Bench(self, results)
        bench.parity()
        for name in self.measures:
            for cases in getattr(bench, name.replace("-", "_"))():
                bench.time(cases)


@dataclasses.dataclass(kw_only=True)
class Core(Compare):
    """Time the training step, decoding by kind of cache, and saving, in MLX."""

    name = "core"
    title = "The training step, decoding by cache, and a save"
    models: tuple[str, ...] = ("nano", "mla-124m", "mla-124m-r128")
    backends: tuple[Literal["mlx", "torch"], ...] = ("mlx",)
    measures: tuple[Measure, ...] = ("loops", "decoding", "save")
    batch: tuple[int, ...] = (1,)
    context: tuple[int, ...] = (64, 256, 1000)
    train_batch: int = 4
    uncached: Literal["none", "first", "all"] = "all"


@dataclasses.dataclass(kw_only=True)
class Decode(Compare):
    """Time decoding by kind of cache, batch and context."""

    name = "decode"
    title = "Decoding by kind of cache"
    models: tuple[str, ...] = ("gpt2-124m", "mla-124m", "mla-124m-r128")
    measures: tuple[Measure, ...] = ("decoding", "chunks")
    batch: tuple[int, ...] = (1, 4, 16, 64)
    context: tuple[int, ...] = (128, 512, 1000, 4096, 16384)
    references: bool = False


class Bench:
    """The candidates and the measurements; each method named as a measure yields the cases of one
    measurement after the other."""

    def __init__(self, settings: Compare, results: Results):
        self.s, self.results = settings, results
        longest = max(settings.context) + 64
        long = longest > 1064 and not settings.quick
        self.models = Models(settings.models, settings.quick, longest if long else None)
        self.candidates = self.models.candidates(
            settings.backends, settings.dtype, settings.device, settings.references
        )
        self._failed: set[tuple[str, str]] = set()
        self._rates: dict[str, tuple[float, Rates]] = {}
        if self.models.baseline is not None:
            results.document.setdefault("baseline", self.models.baseline)

    def parity(self) -> None:
        """Compare the logits of every subject with those of the first one that has the same
        weights. Subjects that differ are not timed."""
        found: list[Parity] = []
        for name, config in self.models.configs.items():
            ids = _ids(2, min(48, config.n_positions), config)
            expected: np.ndarray | None = None
            first = ""
            for c in (c for c in self.candidates if c.weights == name):
                logits = c.load().logits(ids)
                framework(c.backend).release()
                if expected is None:
                    expected, first = logits, f"{c.backend} {c.model}"
                    continue
                difference, allowed = float(np.abs(logits - expected).max()), ALLOWED[self.s.dtype]
                ok = bool(difference <= allowed)
                found.append({
                    "weights": name, "backend": c.backend, "model": c.model, "against": first,
                    "largest_logit_difference": difference, "allowed": allowed,
                    "positions": ids.size, "ok": ok,
                })  # fmt: skip
                print(f"parity {c.backend} {c.model}: largest logit difference {difference:.2g}")
                if not ok:
                    self._failed.add((c.backend, c.model))
        looked_at = {(c.backend, c.model) for c in self.candidates}
        before = self.results.document["parity"]
        kept = [f for f in before if (f["backend"], f["model"]) not in looked_at]
        self.results.add(parity=kept + found)

    def time(self, cases: list[Case]) -> None:
        """Time the cases that have no row yet; measure the device's peak rates before and after."""
        missing = [c for c in cases if not self.results.has(**c.row.key)]
        if not missing:
            return
        self.results.begin()
        backends = dict.fromkeys(c.row.backend for c in missing)
        before = {b: self.rates(b) for b in backends}
        rows = time_cases(missing, self.s.repetitions)
        after = {b: self.rates(b) for b in backends}
        for row in rows:
            pair = before[row.backend], after[row.backend]
            row.rates = {
                "matmul_flops": max(r["matmul_flops"] for r in pair),
                "memory_bytes": max(r["memory_bytes"] for r in pair),
            }
            row.set_roofline()
            shown = f"{row.ms:.3g} ms" if row.ms else row.status
            print(
                f"{row.measure:<12} {row.backend:<6} {row.model:<36} {row.cache or '':<13}batch "
                f"{row.batch}, {row.context} tokens: "
                f"{f'{row.speed:,.1f} tok/s' if row.speed else shown}",
                flush=True,
            )
        self.results.add(*rows)

    def rates(self, backend: str) -> Rates:
        """The device's peak rates, measured again once they are older than `FRESH`."""
        at, found = self._rates.get(backend, (-math.inf, None))
        if found is None or time.monotonic() - at > FRESH:
            side = 1024 if self.s.quick else 8192
            found = framework(backend).rates(self.s.dtype, self.s.device, side)
            self._rates[backend] = time.monotonic(), found
        return found

    def forward(self) -> Iterator[list[Case]]:
        """One pass for the logits of every position, without a cache."""
        most = self.s.forward_batch
        for batch, length in ((most, 512), (max(1, most // 2), 1024)):
            length = length // 16 if self.s.quick else length
            yield [
                self._case(
                    "forward", c, batch, length,
                    methodcaller("forward", _ids(batch, length, c.config)),
                )
                for c in self._timed() if length <= c.config.n_positions
            ]  # fmt: skip

    def first_token(self) -> Iterator[list[Case]]:
        """Read a prompt into an empty cache, and choose the next token."""
        for context in self._contexts():
            cases = []
            for c, kind in self._decoders():
                if context < c.config.n_positions:
                    call = methodcaller("first_token", _ids(1, context, c.config)[0], kind)
                    cases.append(self._case("first token", c, 1, context, call, kind))
            yield cases

    def decoding(self) -> Iterator[list[Case]]:
        """Greedy steps after a context; without a cache at batch 1 alone."""
        for batch, context in itertools.product(self.s.batch, self._contexts()):
            cases = []
            for c, kind in self._decoders():
                # Few steps where each takes long.
                steps = 8 if batch == 1 and kind != "none" else 2
                size = cache_bytes(c.config, kind, self.s.dtype) * context * batch
                fits = size <= self.s.max_cache_gb * 1e9 and (kind != "none" or batch == 1)
                if fits and context + steps + 2 <= c.config.n_positions:
                    call = methodcaller("decode", batch, context, steps, kind)
                    cases.append(self._case("decoding", c, batch, context, call, kind, steps))
            yield cases

    def training(self, ways: Sequence[tuple[str, str]] = ()) -> Iterator[list[Case]]:
        """One optimizer step, one session in memory at a time."""
        for backend in self.s.backends:
            cases = []
            for c in self._trained(backend):
                length = self._length(c)
                ids = _ids(self.s.train_batch, length + 1, c.config)
                call = methodcaller("step", ids[:, :-1], ids[:, 1:])
                for way in ("", *(way for b, way in ways if b == backend)):
                    case = self._case("training", c, len(ids), length, call, way=way)
                    case.load = self._trainer(c, way)
                    cases.append(case)
            yield cases

    def loops(self) -> Iterator[list[Case]]:
        """Training steps of this project beside those of other implementations."""
        return self.training((("mlx", EAGER), ("torch", PLAIN)))

    def save(self) -> Iterator[list[Case]]:
        """A training checkpoint: weights, optimizer state, checksums, sync, rename."""
        for c in (c for backend in self.s.backends for c in self._trained(backend)):
            case = self._case("save", c, 1, 0, methodcaller("save"))
            case.row.bytes = 12.0 * num_parameters(c.config)
            case.load = self._trainer(c)
            yield [case]

    def chunks(self) -> Iterator[list[Case]]:
        """Calls with several tokens at batch 1 on a latent cache: absorbed, expanded, and as the
        model chooses."""
        paths = {"absorbed": True, "expanded": False, "chosen": None}
        for context, new in itertools.product(self._contexts(), CHUNKS):
            cases = []
            for c, path in itertools.product(self._latent(), paths):
                if context + new <= c.config.n_positions:
                    call = functools.partial(_read_on, context, new, paths[path])
                    case = self._case("chunk", c, 1, context, call, "latent", new)
                    case.row.new, case.row.path = new, path
                    cases.append(case)
            yield cases

    def _contexts(self) -> list[int]:
        return [max(1, c // 16) if self.s.quick else c for c in self.s.context]

    def _timed(self) -> list[Candidate]:
        return [c for c in self.candidates if (c.backend, c.model) not in self._failed]

    def _trained(self, backend: str) -> list[Candidate]:
        return [c for c in self._timed() if c.backend == backend and c.model == c.weights]

    def _latent(self) -> list[Candidate]:
        return [c for c in self._timed() if c.config.attention_spec.latent_widths]

    def _decoders(self) -> list[tuple[Candidate, str]]:
        """Subjects with each kind of cache, and without a cache, as the original decodes."""
        latent = self._latent()
        first = [c for c in latent if c.model == latent[0].model]
        uncached = {"none": [], "first": first, "all": latent}[self.s.uncached]
        return [
            (c, kind)
            for c in self._timed()
            for kind in (("latent", "materialized") if c in latent else ("materialized",))
        ] + [(c, "none") for c in uncached]

    def _length(self, c: Candidate) -> int:
        """Tokens of a sequence in training."""
        return min(32 if self.s.quick else 512, c.config.n_positions)

    def _trainer(self, c: Candidate, way: str = "") -> Callable[[], Trainer]:
        """A function that loads a trainer."""
        config = TrainConfig(dtype=self.s.dtype, model=c.config)
        config.batch_size, config.seq_len = self.s.train_batch, self._length(c)
        return lambda: framework(c.backend).trainer(config, self.s.device, way)

    def _case(
        self, measure: Any, c: Candidate, batch: int, context: int, call: Callable[[Any], Any],
        kind: str | None = None, steps: int = 1, way: str = "",
    ) -> Case:  # fmt: skip
        """A case of `steps` tokens a sequence in decoding, with a kind of cache where it has one;
        `way` is another project's."""
        way, dtype = ORIGINAL if kind == "none" else way, self.s.dtype
        width = cache_bytes(c.config, kind, dtype) if kind else None
        weights = num_parameters(c.config) * BYTES[dtype]
        cached = (width or 0) * context * batch if measure == "decoding" else 0
        row = Row(
            measure=measure, backend=c.backend, model=f"{way} ({c.model})" if way else c.model,
            cache=kind, batch=batch, context=context, weight_bytes=weights,
            cache_bytes_per_token=width, bytes=float(steps * (weights + cached)),
            flops=call_flops(measure, c.config, kind, batch, context, steps),
        )  # fmt: skip
        counts = {"decoding": batch * steps, "chunk": steps, "save": 0}
        tokens = counts.get(measure, batch * context)
        return Case(row, c.load, call, tokens)


def _read_on(context: int, new: int, absorb: bool | None, subject: Subject) -> Timed:
    if absorb is None:
        return subject.read_on(1, context, new)
    attention = importlib.import_module(f"mlx_mla.model.model_{subject.backend}").LatentAttention
    with mock.patch.object(attention, "_absorbing_is_cheaper", lambda *_: absorb):
        return subject.read_on(1, context, new)


def _ids(batch: int, length: int, config: ModelConfig) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, config.vocab_size or 1, (batch, length)).astype(np.int32)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(lambda own: run(Compare, own, PROG), argv)


if __name__ == "__main__":
    sys.exit(main())
