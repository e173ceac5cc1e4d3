"""What a study's finished runs show: a row for every arm, and comparisons of pairs of arms with
their intervals, p values and verdicts."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.studying.plan import Cell, Place, Study
from bench.studying.results import Record, Results, Tuning
from mlx_mla.errors import UserError

Curve = Sequence[tuple[int, float]]
"""Tokens, and a mean over seeds after them."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval; the ends are infinite for a single value."""

    mean: float
    low: float
    high: float
    count: int


@dataclasses.dataclass
class Comparison:
    """An arm against a rival at one size and budget, paired seed by seed."""

    rival: Cell
    arm: Cell
    values: list[float]
    """Differences of the final losses on common seeds, arm less rival."""
    difference: Interval | None
    """With the SD of these differences, on which the verdict is based."""
    p: float | None
    verdict: str
    primary: bool = False
    with_pooled_sd: Interval | None = None
    """With the SD pooled over all comparisons of the size and budget."""
    confirmed: bool = True
    """Whether the interval with the pooled SD has the same verdict."""
    holm: float | None = None
    """p adjusted for the number of exploratory comparisons."""

    @property
    def what(self) -> tuple[frozenset[str], Place]:
        """What is compared, in either direction."""
        return frozenset({self.arm.arm, self.rival.arm}), self.arm.place


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm at a size and budget."""

    cell: Cell
    tuning: Tuning
    finals: Mapping[int, Record]
    comparison: Comparison | None
    """With the baseline; None for the baseline itself."""
    loss: float | None
    """The baseline's mean final loss plus the paired difference, so that a seed which only some
    arms have finished shifts none; nats a token."""
    tokens_to_baseline: float | None
    """Tokens after which the mean curve is at the baseline's final loss, on common seeds; infinite
    if it never is, None if that is not known."""
    gap: Curve
    """The paired difference along the run."""

    @property
    def difference(self) -> Interval | None:
        return None if self.comparison is None else self.comparison.difference

    @property
    def verdict(self) -> str:
        return self.comparison.verdict if self.comparison else "baseline"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to run."""
        return set(self.finals) == set(self.cell.seeds) or self.tuning.diverged

    @property
    def diverged(self) -> list[int]:
        """Seeds whose run diverged."""
        return [seed for seed, r in self.finals.items() if r.loss is None]

    @property
    def tuned_on(self) -> list[int]:
        """Seeds whose run was a tuning run, too: the tuning chose them for their loss."""
        tried = {run.key for run in self.tuning.tried}
        return [run.seed for run in self.tuning.finals if run.key in tried]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a study shows."""

    rows: Sequence[Row]
    """For every cell, finished or not."""
    primary: Comparison | None
    pairs: Sequence[Comparison]
    """Comparisons that the file names beside those with the baseline."""
    exploratory: int
    """Different comparisons that have a p value, without the primary one."""


def summarize(study: Study, results: Results) -> Summary:
    """Compare what has finished."""
    rows = [_row(study, results, cell) for cell in study.cells]
    primary = _primary(study, results)
    pairs = [
        _compare(study, results, arm, rival)
        for place in study.places
        for before, after in study.pairs
        if (rival := study.cell(before, place)) and (arm := study.cell(after, place))
    ]
    with_baseline = [row.comparison for row in rows if row.comparison]
    exploratory = [*with_baseline, *pairs]
    for place in study.places:
        spread = pooled([c.values for c in with_baseline if c.arm.place == place and c.values])
        for c in [*exploratory, *([primary] if primary else [])]:
            if spread is not None and c.values and c.arm.place == place:
                c.with_pooled_sd = interval(c.values, study.confidence, spread)
                if c.verdict in VERDICTS:
                    c.confirmed = verdict(c.with_pooled_sd, study.margin) == c.verdict
    tested = {c.what: c.p for c in exploratory if c.p is not None}
    if primary:
        tested.pop(primary.what, None)
    adjusted = dict(zip(tested, holm(list(tested.values()))))
    for c in exploratory:
        c.holm = adjusted.get(c.what)
    return Summary(rows, primary, pairs, len(tested))


def _primary(study: Study, results: Results) -> Comparison | None:
    """The primary comparison; None while tuning does not say which arm it is."""
    if (cells := results.primary(study)) is None:
        return None
    return dataclasses.replace(_compare(study, results, *cells), primary=True)


def _compare(study: Study, results: Results, arm: Cell, rival: Cell) -> Comparison:
    """An arm against a rival. The verdict needs every seed that both are asked for."""
    finals = {cell.arm: results.finals(cell) for cell in (arm, rival)}
    values = [_loss(a) - _loss(b) for a, b in _pairs(finals[arm.arm], finals[rival.arm])]
    difference = interval(values, study.confidence) if values else None
    asked = set(arm.seeds) & set(rival.seeds)
    done = asked.intersection(*finals.values())
    diverged = [
        cell.arm
        for cell in (arm, rival)
        if results.tuning(cell).diverged
        or any(r.loss is None for seed, r in finals[cell.arm].items() if seed in asked)
    ]
    if diverged:
        said = "diverged" if arm.arm in diverged else f"unfinished: {rival.arm} diverged"
    elif difference is None or done != asked:
        said = f"unfinished: {len(done)} of {len(asked)} seeds"
    else:
        said = verdict(difference, study.margin)
    return Comparison(rival, arm, values, difference, p_value(values), said)


def _row(study: Study, results: Results, cell: Cell) -> Row:
    rival = study.cell(study.baseline, cell.place)
    assert rival is not None
    finals, base = results.finals(cell), results.finals(rival)
    comparison = None if cell is rival else _compare(study, results, cell, rival)
    pairs = _pairs(finals, base)
    loss = reached = None
    if pairs:
        loss = statistics.fmean(_loss(r) for r in base.values() if r.loss is not None)
        if comparison and comparison.difference:
            loss += comparison.difference.mean
        curve = _mean([dict(a.curve) for a, _ in pairs])
        reached = _reached(curve, statistics.fmean(_loss(b) for _, b in pairs), cell.tokens / 10)
    both = [(dict(a.curve), dict(b.curve)) for a, b in pairs]
    gap = _mean([{n: a[n] - b[n] for n in a if n in b} for a, b in both])
    return Row(cell, results.tuning(cell), finals, comparison, loss, reached, gap)


def _pairs(arm: Mapping[int, Record], base: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    """Runs of both on common seeds, where neither diverged."""
    both = [(arm[seed], base[seed]) for seed in arm if seed in base]
    return [(a, b) for a, b in both if a.loss is not None and b.loss is not None]


def _loss(record: Record) -> float:
    assert record.loss is not None
    return record.loss


def _mean(curves: Sequence[Mapping[int, float]]) -> Curve:
    """The mean of curves at the tokens that all have."""
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    return [(n, statistics.fmean(curve[n] for curve in curves)) for n in shared]


def _reached(curve: Curve, loss: float, apart: float) -> float | None:
    """Tokens at which a curve first reaches a loss, interpolated linearly between its points;
    infinite if it never does, None if the points are further apart."""
    last = (0, math.inf)
    for tokens, value in curve:
        if value <= loss:
            if tokens - last[0] > apart:
                return None
            part = (last[1] - loss) / (last[1] - value) if last[0] else 1.0
            return last[0] + part * (tokens - last[0])
        last = tokens, value
    return math.inf


def student() -> Any:
    """scipy.stats; UserError with what to install if it is missing."""
    try:
        from scipy import stats
    except ImportError:
        raise UserError("a study needs scipy; install it with: pip install -e '.[dev]'") from None
    return stats


def interval(
    values: Sequence[float], confidence: float, spread: tuple[float, int] | None = None
) -> Interval:
    """Student's t-interval of the mean of independent values.

    Args:
        values: At least one.
        confidence: Such as 0.95.
        spread: Standard deviation of a value and its degrees of freedom. None: of these values.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1 and spread is None:
        return Interval(mean, -math.inf, math.inf, 1)
    sd, degrees = spread or (statistics.stdev(values), n - 1)
    half = student().t.ppf(0.5 + confidence / 2, degrees) * sd / math.sqrt(n)
    return Interval(mean, float(mean - half), float(mean + half), n)


def pooled(samples: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """The standard deviation that several samples share, and its degrees of freedom; None where no
    sample has two values."""
    degrees = sum(len(values) - 1 for values in samples)
    if degrees < 1:
        return None
    squares = sum(statistics.variance(v) * (len(v) - 1) for v in samples if len(v) > 1)
    return math.sqrt(squares / degrees), degrees


def p_value(values: Sequence[float]) -> float | None:
    """Of Student's two-sided test that the mean is zero; None for fewer than two values."""
    if len(values) < 2:
        return None
    if len(set(values)) == 1:
        return float(values[0] == 0)
    return float(student().ttest_1samp(values, 0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number by Holm's method, in the same order."""
    adjusted, largest = list(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


VERDICTS = ("better", "not worse", "worse", "not shown")


def verdict(difference: Interval, margin: float) -> str:
    """What a paired difference of losses (arm less rival) shows.

    Args:
        difference: With its interval.
        margin: How much more loss still counts as not worse.
    """
    if difference.high < 0:
        return "better"
    if difference.high <= margin:
        return "not worse"
    return "worse" if difference.low > 0 else "not shown"
