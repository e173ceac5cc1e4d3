"""What a study's finished runs show, an arm at a size and budget at a time."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.studying.intervals import Interval, interval, verdict
from bench.studying.plan import Cell, Study
from bench.studying.results import Record, Results, Tuning, diverged, loss_of
from mlx_mla.model.estimate import cache_bytes_per_token, forward_flops_per_token
from mlx_mla.model.weights import num_parameters, parameter_shapes

CACHE_BYTES_PER_VALUE = 2
DIVERGED, UNFINISHED = "diverged", "unfinished"


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """A mean over seeds, after so many tokens."""

    tokens: int
    value: Interval


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm at a size and budget."""

    cell: Cell
    tuning: Tuning
    finals: Mapping[int, Record]
    loss: Interval | None
    """Final held-out loss over the seeds that did not diverge, nats a token."""
    difference: Interval | None
    """Paired with the baseline, seed by seed."""
    verdict: str
    tokens_to_baseline: float | None
    """Tokens after which the mean curve is at the baseline's final loss, over the seeds that both
    have; None: never."""
    curve: Sequence[CurvePoint]
    gap: Sequence[CurvePoint]
    """The paired difference along the run."""

    @property
    def diverged(self) -> list[int]:
        """Seeds whose run diverged."""
        return [seed for seed, r in self.finals.items() if r["loss"] is None]

    @property
    def parameters(self) -> int:
        return num_parameters(self.cell.config.model)

    @property
    def non_embedding(self) -> int:
        """Parameters without the token and position embeddings."""
        shapes = parameter_shapes(self.cell.config.model).items()
        return sum(math.prod(s) for n, s in shapes if ".wte." not in n and ".wpe." not in n)

    @property
    def flops_per_token(self) -> int:
        """Of the forward pass."""
        return forward_flops_per_token(self.cell.config.model, self.cell.config.context)

    @property
    def cache_bytes(self) -> int:
        """Bytes cached for one token in 16 bits, all layers."""
        return cache_bytes_per_token(self.cell.config.model, CACHE_BYTES_PER_VALUE)

    def plain(self) -> dict[str, Any]:
        """What results.json says of the row."""
        cell, scale = self.cell, dict[str, Any]()
        if cell.tunes_scale:
            found = self.tuning.scale
            scale = {
                "initializer_range": found and found.best,
                "initializer_range_found": found.note if found else "",
                "initializer_ranges_tried": _plain_losses(found.losses if found else {}),
            }
        return {
            "arm": cell.arm,
            "size": cell.size,
            "tokens": cell.tokens,
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding,
            "forward_flops_per_token": self.flops_per_token,
            "cache_bytes_per_token": self.cache_bytes,
            "rate": self.tuning.rate.best,
            "rate_found": self.tuning.rate.note,
            "rates_tried": _plain_losses(self.tuning.rate.losses),
            **scale,
            "seeds": sorted(self.finals),
            "diverged_seeds": self.diverged,
            "loss": _plain(self.loss),
            "difference": _plain(self.difference),
            "verdict": self.verdict,
            "tokens_to_baseline_loss": self.tokens_to_baseline,
        }


@dataclasses.dataclass(frozen=True)
class Step:
    """An arm against another that is not the baseline, such as a step of the stair."""

    before: Cell
    after: Cell
    difference: Interval | None


def summarise(study: Study, results: Results) -> list[Row]:
    """A row for every cell of the study, finished or not."""
    return [_row(study, results, cell) for cell in study.cells]


def chain(study: Study, results: Results, arms: Sequence[str]) -> list[Step]:
    """Each of the arms against the one before it, at every size and budget that has both."""
    steps = []
    for size, tokens in dict.fromkeys((c.size, c.tokens) for c in study.cells):
        cells = [study.cell(arm, size, tokens) for arm in arms]
        there = [cell for cell in cells if cell is not None]
        for before, after in itertools.pairwise(there):
            first, second = (results.finals(c, study.extensions) for c in (before, after))
            steps.append(Step(before, after, _paired(second, first, study.confidence)))
    return steps


def _row(study: Study, results: Results, cell: Cell) -> Row:
    tuning = results.tuning(cell, study.extensions)
    finals = results.finals(cell, study.extensions)
    base_cell = study.baseline_of(cell)
    base = results.finals(base_cell, study.extensions) if base_cell else {}
    is_baseline = cell.arm == study.baseline
    difference = None if is_baseline else _paired(finals, base, study.confidence)
    losses = [loss_of(r) for r in finals.values() if r["loss"] is not None]
    curve = _curve([r["curve"] for r in finals.values() if r["loss"] is not None], study.confidence)
    if is_baseline:
        said = "baseline"
    elif tuning.diverged or diverged(finals.values()):
        said = DIVERGED
    elif difference is None or set(finals) != set(cell.seeds):
        said = UNFINISHED
    else:
        said = verdict(difference, study.margin)
    pairs = _pairs(finals, base)
    return Row(
        cell=cell,
        tuning=tuning,
        finals=finals,
        loss=interval(losses, study.confidence) if losses else None,
        difference=difference,
        verdict=said,
        tokens_to_baseline=_reached(
            _curve([a["curve"] for a, _ in pairs], study.confidence),
            statistics.fmean(loss_of(b) for _, b in pairs),
        )
        if pairs
        else None,
        curve=curve,
        gap=() if is_baseline else _gap(finals, base, study.confidence),
    )


def _pairs(arm: Mapping[int, Record], base: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    """Runs of both at the seeds that both have, where neither diverged."""
    both = [(arm[seed], base[seed]) for seed in arm if seed in base]
    return [(a, b) for a, b in both if a["loss"] is not None and b["loss"] is not None]


def _paired(
    arm: Mapping[int, Record], base: Mapping[int, Record], confidence: float
) -> Interval | None:
    values = [loss_of(a) - loss_of(b) for a, b in _pairs(arm, base)]
    return interval(values, confidence) if values else None


def _gap(
    arm: Mapping[int, Record], base: Mapping[int, Record], confidence: float
) -> list[CurvePoint]:
    curves = []
    for a, b in _pairs(arm, base):
        other = dict(b["curve"])
        curves.append([[n, loss - other[n]] for n, loss in a["curve"] if n in other])
    return _curve(curves, confidence)


def _curve(curves: Sequence[Sequence[Sequence[float]]], confidence: float) -> list[CurvePoint]:
    """The mean of curves at the tokens that all have."""
    tables = [{int(n): value for n, value in curve} for curve in curves]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [CurvePoint(n, interval([t[n] for t in tables], confidence)) for n in shared]


def _reached(curve: Sequence[CurvePoint], loss: float) -> float | None:
    """Tokens at which a curve first comes down to a loss, between its points by a straight line."""
    last: CurvePoint | None = None
    for point in curve:
        if point.value.mean <= loss:
            if last is None:
                return float(point.tokens)
            share = (last.value.mean - loss) / (last.value.mean - point.value.mean)
            return last.tokens + share * (point.tokens - last.tokens)
        last = point
    return None


def _plain_losses(losses: Mapping[float, float]) -> dict[str, float | None]:
    return {f"{value:g}": _finite(loss) for value, loss in losses.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Interval | None) -> dict[str, Any] | None:
    if value is None:
        return None
    ends = {"low": _finite(value.low), "high": _finite(value.high)}
    return {"mean": value.mean, **ends, "n": value.count}
