"""Decoding by kind of cache, batch and context: speed, bytes, what `--cache auto` chooses, and what
Python costs.

    python -m bench.decode --quick
    python -m bench.decode --out bench/results                             # hours on a CPU
    python -m bench.decode --out bench/results --resume --batch 1 4        # in parts

Method, rates and rooflines are those of compare_backends.py: the same weights in both backends,
logits that agree, subjects in turns. A cell is greedy steps after a context that is in the cache;
`ms` of a row is of all its steps. The roofline's bytes are the weights and the cache, each once a
step; its rate is the best the device showed. "chunk" rows are one call with several tokens on a
latent cache, absorbed and expanded, beside what the model chooses.

Writes NAME.json after every cell, NAME.md and NAME.png at the end, NAME being the machine, the date
and "decode".
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional
from unittest import mock

from bench.compare_backends import Bench
from bench.decode_report import REPORT
from bench.harness import Row, document, markdown, report_name, rewrite
from bench.rows import Results
from bench.subjects import costs
from bench.subjects.contract import Subject
from mlx_mla import cli
from mlx_mla.decoding.cache_choice import choose_cache
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
    """Tokens in the cache. The position table of the presets is made long enough."""
    max_cache_gb: float = 5.0
    """Leave out cells whose cache is larger; while it is filled, it is held twice."""
    repetitions: int = 5
    """Timed runs of every subject."""
    quick: bool = False
    """Small models of the same kinds and short contexts: every path in a minute."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""
    resume: bool = False
    """Keep the cells that the report has already, and measure the rest."""


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
    path = s.out and s.out / f"{report_name('decode')}.json"
    if path and path.exists() and not s.resume:
        raise UserError(
            f"{path}: is there already; add --resume to complete it, or give --out a new name"
        )
    found = document("bench.decode_report", PROG, argv, s, s.backends)
    results = Results(found, path, s.resume)
    bench = Decoding(s, results)
    bench.parity()
    bench.rates()
    for measure in s.measures:
        {"overhead": bench.overhead, "decoding": bench.decoding, "chunks": bench.chunks}[measure]()
    bench.rates()
    results.save()
    print(markdown(REPORT, results.document, {}))
    if path:
        rewrite(REPORT, results.document, path)
    return 0


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
                steps = 8 if batch == 1 else 2
                cases = []
                for subject, kind in self._decoders():
                    size = costs.cache_bytes(subject.config, kind, self.s.dtype) * context * batch
                    if kind == "none" or size > self.s.max_cache_gb * 1e9:
                        continue
                    flops = batch * costs.decode_flops(subject.config, kind, context)
                    run = functools.partial(subject.decode, batch, context, steps, kind)
                    cases.append(
                        self._case(
                            "decoding", subject, kind, batch, context, run, steps * flops, steps
                        )
                    )
                self._measure(cases)
        latent = {(s.backend, s.model): s for s in self._timed() if s.config.kind.latent_widths}
        for row in self.results.document["rows"]:
            found = latent.get((row["backend"], row["model"]))
            if row["measure"] == "decoding" and found:
                where = (found.backend, found.device_kind, row["batch"], row["context"])
                row["auto"] = choose_cache(found.config, *where)

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
                        run: Any = lambda s=subject, c=context, n=new, on=on: _read_on(s, c, n, on)  # noqa: E731
                        case = self._case("chunk", subject, "latent", 1, context, run, 0.0)
                        case.key.update(new=new, path=path)
                        cases.append(dataclasses.replace(case, tokens=new))
                self._measure(cases)

    def overhead(self) -> None:
        """Python's time and MLX's for a step at batch 1, eager and compiled."""
        for subject in self._timed():
            if subject.backend != "mlx" or not subject.config.kind.latent_widths:
                continue
            for context in (c for c in self.s.context if c <= 1000):
                for how in ("eager", "compiled"):
                    key: Row = {
                        "measure": "overhead",
                        "backend": "mlx",
                        "model": subject.model,
                        "cache": how,
                        "batch": 1,
                        "context": context,
                    }
                    if self.results.has(**key):
                        continue
                    overhead = {"eager": "python_overhead", "compiled": "compiled_overhead"}
                    method = getattr(subject, overhead[how])
                    method(context, 2)
                    described, computed = method(context, 20)
                    row = {
                        **key,
                        "python_ms": described * 1e3,
                        "compute_ms": computed * 1e3,
                        "status": "measured",
                    }
                    self.results.add([row])
                    print(f"overhead {subject.model} {how} {context} tokens: Python "
                          f"{row['python_ms']:.2f} ms, "
                          f"MLX {row['compute_ms']:.2f} ms", flush=True)  # fmt: skip


def _read_on(subject: Subject, context: int, new: int, absorb: bool | None) -> tuple[float, None]:
    attention = importlib.import_module(f"mlx_mla.model_{subject.backend}").LatentAttention
    if absorb is None:
        return subject.read_on(1, context, new), None
    with mock.patch.object(attention, "_absorbing_is_cheaper", lambda *_: absorb):
        return subject.read_on(1, context, new), None


if __name__ == "__main__":
    sys.exit(main())
