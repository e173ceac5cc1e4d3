"""Decoding by kind of cache, batch and context: speed, bytes, and what
Python costs.

    python -m bench.decode --quick
    python -m bench.decode --out bench/results --resume --minutes 8        # in pieces: exit code 75
    python -m bench.decode --out bench/results --resume --batch 1 4        # until all is there

Method and rows are those of compare_backends.py: the same weights in both backends, logits that
agree, one subject in memory at a time, half of its runs in order and half backwards. A cell is
greedy steps after a context that is in the cache, by the loop that `generate` has; `ms` of a row is
of all its steps. The roofline's bytes are the weights and the cache, each once a step; its rates
are the best that the device showed beside the row. "chunk" rows are one call with several tokens on
a latent cache, absorbed and expanded, beside what the model chooses.

Writes NAME.json after every cell, NAME.md and pictures at the end, NAME being the machine, the
date, the type if it is not float32, and "decode"; --resume takes the newest of this machine.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional
from unittest import mock

from bench import subjects
from bench.compare_backends import Bench, decode, decode_steps, take
from bench.decode_report import REPORT
from bench.harness import Row, document, report_name
from bench.rows import Results
from bench.subjects import costs
from bench.subjects.contract import Subject, Timed
from mlx_mla import cli
from mlx_mla.errors import UserError

PROG = "python -m bench.decode"
CHUNKS = (2, 8, 32)


@dataclasses.dataclass(kw_only=True)
class DecodeBench:
    """Measure decoding by kind of cache, batch and context in both backends."""

    models: tuple[str, ...] = ("gpt2-124m", "mla-124m", "mla-124m-r128")
    """Presets. Ratios are against the first one with multi-head attention."""
    backends: tuple[Literal["mlx", "torch"], ...] = ("mlx", "torch")
    """Frameworks to time."""
    device: Literal["auto", "cpu", "gpu", "mps", "cuda"] = "auto"
    """Device of both; "auto" takes a GPU where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and computation."""
    measures: tuple[Literal["overhead", "decoding", "chunks"], ...] = (
        "overhead",
        "decoding",
        "chunks",
    )
    """What to measure."""
    batch: tuple[int, ...] = (1, 4, 16, 64)
    """Batch sizes."""
    context: tuple[int, ...] = (128, 512, 1000, 4096, 16384)
    """Tokens in the cache. The position table of the presets is made long enough, and with it what
    decoding on MPS caches, which is always as long: leave 4096 and more to a run of their own."""
    max_cache_gb: float = 5.0
    """Leave out cells whose cache is larger: it, the weights and a copy of one layer's cache must
    fit into memory (3 for 8 GB)."""
    repetitions: int = 5
    """Timed runs of every subject."""
    quick: bool = False
    """Small models of the same kinds and short contexts: every path in a minute."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""
    resume: bool = False
    """Keep the cells that the report has already, and measure the rest."""
    minutes: Optional[float] = None
    """Begin no cell after so many minutes; the exit code is then 75. None: no limit."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    s = cli.parse(DecodeBench, argv, PROG)
    if not s.models or not s.backends or not s.measures or not s.batch or not s.context:
        raise UserError(
            "--models, --backends, --measures, --batch and --context need at least one value each"
        )
    if min(*s.batch, *s.context, s.repetitions) < 1:
        raise UserError("--batch, --context and --repetitions must be at least 1")
    if s.quick:
        s = dataclasses.replace(s, batch=(1, 3), context=(16, 48), repetitions=2)
    if s.minutes is not None and (s.minutes <= 0 or s.out is None):
        raise UserError("--minutes must be above 0, and needs --out")
    path = s.out and _report_path(s.out, s.dtype, s.resume)
    if path and path.exists() and not s.resume:
        raise UserError(
            f"{path}: is there already; add --resume to complete it, or give --out a new name"
        )
    found = document("bench.decode_report", PROG, argv, s, dict.fromkeys(s.backends, s.device))
    bench = Decoding(s, Results(found, path, s.resume))
    measures = {"overhead": bench.overhead, "decoding": bench.decoding, "chunks": bench.chunks}
    return take(bench, [measures[name] for name in s.measures], REPORT, path)


def _report_path(out: Path, dtype: str, resume: bool) -> Path:
    """Today's report; with `resume` the newest of this machine, should there be one."""
    today = report_name("decode" if dtype == "float32" else f"{dtype}_decode")
    machine, _, kind = today.split("_", 2)
    older = sorted(out.glob(f"{machine}_????-??-??_{kind}.json")) if resume else []
    return older[-1] if older else out / f"{today}.json"


class Decoding(Bench):
    """The models, and what is measured of their decoding."""

    def __init__(self, settings: DecodeBench, results: Results):
        room = max(settings.context) + 64
        super().__init__(
            settings, results, room if room > 1024 or settings.quick else None, references=False
        )

    def decoding(self) -> None:
        for batch in self.s.batch:
            for context in self.s.context:
                cases = []
                for subject, kind in self._decoders():
                    steps = decode_steps(batch, kind)
                    size = costs.cache_bytes(subject.config, kind, self.s.dtype) * context * batch
                    if kind == "none" or size > self.s.max_cache_gb * 1e9:
                        continue
                    flops = batch * costs.decode_flops(subject.config, kind, context)
                    run = functools.partial(decode, batch, context, steps, kind)
                    case = self._case(
                        "decoding", subject, kind, batch, context, run, steps * flops, steps
                    )
                    cases.append(case)
                self._measure(cases)

    def chunks(self) -> None:
        """Calls with several tokens at batch 1 on a latent cache: absorbed, expanded, and as the
        model chooses."""
        for context in self.s.context:
            for new in CHUNKS:
                cases = []
                for subject in self._timed():
                    if not subject.config.kind.latent_widths:
                        continue
                    for path, on in (("absorbed", True), ("expanded", False), ("chosen", None)):
                        run = functools.partial(_read_on, context, new, on)
                        case = self._case("chunk", subject, "latent", 1, context, run, 0.0)
                        case.key.update(new=new, path=path)
                        cases.append(dataclasses.replace(case, tokens=new))
                self._measure(cases)

    def overhead(self) -> None:
        """Python's time and MLX's for a step at batch 1, eager and compiled."""
        contexts = [c for c in self.s.context if c <= 1000]
        for candidate in self._timed():
            if candidate.backend != "mlx" or not candidate.config.kind.latent_widths:
                continue
            keys: list[Row] = [
                {
                    "measure": "overhead",
                    "backend": "mlx",
                    "model": candidate.model,
                    "cache": how,
                    "batch": 1,
                    "context": context,
                }
                for context in contexts
                for how in ("eager", "compiled")
            ]
            if missing := [key for key in keys if not self.results.has(**key)]:
                _overhead(candidate.load(), missing, self.results)
                subjects.release("mlx")


def _overhead(subject: Any, keys: list[Row], results: Results) -> None:
    for key in keys:
        eager = key["cache"] == "eager"
        method = subject.python_overhead if eager else subject.compiled_overhead
        method(key["context"], 2)
        described, computed = method(key["context"], 20)
        row = {
            **key,
            "python_ms": described * 1e3,
            "compute_ms": computed * 1e3,
            "status": "measured",
        }
        results.add([row])
        print(
            f"overhead {subject.model} {key['cache']} {key['context']} tokens: Python "
            f"{row['python_ms']:.2f} ms, MLX {row['compute_ms']:.2f} ms",
            flush=True,
        )


def _read_on(context: int, new: int, absorb: bool | None, subject: Subject) -> Timed:
    attention = importlib.import_module(f"mlx_mla.model.model_{subject.backend}").LatentAttention
    if absorb is None:
        return subject.read_on(1, context, new)
    with mock.patch.object(attention, "_absorbing_is_cheaper", lambda *_: absorb):
        return subject.read_on(1, context, new)


if __name__ == "__main__":
    sys.exit(main())
