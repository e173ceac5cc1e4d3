"""What a study's finished runs show: a row for every arm, and comparisons of pairs of arms."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from bench.studying import intervals
from bench.studying.intervals import Interval, interval, p_value, pooled
from bench.studying.plan import Cell, Study
from bench.studying.results import Record, Results, Tuning
from mlx_mla.model.estimate import cache_bytes_per_token, forward_flops_per_token
from mlx_mla.model.weights import num_parameters, parameter_shapes

CACHE_BYTES_PER_VALUE = 2
BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """A mean over seeds, after so many tokens."""

    tokens: int
    value: Interval


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
    holm: float | None = None
    """p adjusted for the number of exploratory comparisons."""

    @property
    def agrees(self) -> bool:
        """Whether both intervals exclude zero, or neither."""
        if self.difference is None or self.with_pooled_sd is None:
            return True
        return self.difference.excludes_zero == self.with_pooled_sd.excludes_zero


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm at a size and budget."""

    cell: Cell
    tuning: Tuning
    finals: Mapping[int, Record]
    comparison: Comparison | None
    """With the baseline; None for the baseline itself."""
    loss: float | None
    """The baseline's mean final loss plus the paired difference, so that seeds which only some
    arms have move none; nats a token."""
    tokens_to_baseline: float | None
    """Tokens after which the mean curve is at the baseline's final loss, on common seeds; None if
    it never is."""
    gap: Sequence[CurvePoint]
    """The paired difference along the run."""

    @property
    def difference(self) -> Interval | None:
        return None if self.comparison is None else self.comparison.difference

    @property
    def verdict(self) -> str:
        return self.comparison.verdict if self.comparison else BASELINE

    @property
    def finished(self) -> bool:
        """Whether every seed has a record."""
        return set(self.finals) == set(self.cell.seeds)

    @property
    def diverged(self) -> list[int]:
        """Seeds whose run diverged."""
        return [seed for seed, r in self.finals.items() if r.loss is None]

    @property
    def tuned_on(self) -> list[int]:
        """Seeds whose run was a tuning run, too: the tuning chose them for their loss."""
        tried = {run.key for run in self.tuning.tried}
        return [run.seed for run in self.tuning.finals if run.key in tried]

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


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a study shows."""

    rows: Sequence[Row]
    """For every cell, finished or not."""
    primary: Comparison | None
    pairs: Sequence[Comparison]
    """Comparisons that the file names beside those with the baseline."""


def summarise(study: Study, results: Results) -> Summary:
    """Compare what has finished."""
    rows = [_row(study, results, cell) for cell in study.cells]
    primary = _primary(study, results)
    pairs = []
    for place in study.places:
        for before, after in study.pairs:
            rival, arm = study.cell(before, place), study.cell(after, place)
            if rival is not None and arm is not None:
                pairs.append(_compare(study, results, arm, rival))
    exploratory = [*(row.comparison for row in rows if row.comparison), *pairs]
    for place in study.places:
        here = [c for c in exploratory if c.arm.place == place]
        with_baseline = [row.comparison for row in rows if row.comparison]
        spread = pooled([c.values for c in with_baseline if c.arm.place == place and c.values])
        for c in [*here, *([primary] if primary else [])]:
            if c.values and spread is not None and c.arm.place == place:
                c.with_pooled_sd = interval(c.values, study.confidence, spread)
    if primary:  # the same comparison is not exploratory where it stands beside others
        exploratory = [c for c in exploratory if (c.arm, c.rival) != (primary.arm, primary.rival)]
    tested = [(c, c.p) for c in exploratory if c.p is not None]
    for (c, _), adjusted in zip(tested, intervals.holm([p for _, p in tested])):
        c.holm = adjusted
    return Summary(rows, primary, pairs)


def _primary(study: Study, results: Results) -> Comparison | None:
    """The primary comparison; None while tuning does not say which arm it is."""
    if study.primary is None:
        return None
    (place,) = study.places
    arms, rival = study.primary
    cells = [cell for arm in arms if (cell := study.cell(arm, place))]
    against = study.cell(rival, place)
    tunings = [results.tuning(cell, study.extensions) for cell in cells]
    if against is None or (len(cells) > 1 and any(tuning.wanted for tuning in tunings)):
        return None
    chosen = min(tunings, key=lambda tuning: tuning.loss).cell
    return dataclasses.replace(_compare(study, results, chosen, against), primary=True)


def _compare(study: Study, results: Results, arm: Cell, rival: Cell) -> Comparison:
    """An arm against a rival. The verdict needs every seed that both are asked for."""
    runs = [results.finals(cell, study.extensions) for cell in (arm, rival)]
    values = [_loss(a) - _loss(b) for a, b in _pairs(*runs)]
    difference = interval(values, study.confidence) if values else None
    asked = set(arm.seeds) & set(rival.seeds)
    done = asked & runs[0].keys() & runs[1].keys()
    diverged = [
        cell.arm
        for cell, found in zip((arm, rival), runs)
        if results.tuning(cell, study.extensions).diverged
        or any(found[seed].loss is None for seed in asked if seed in found)
    ]
    if diverged:
        said = "diverged" if arm.arm in diverged else f"unfinished: {rival.arm} diverged"
    elif difference is None or done != asked:
        said = f"unfinished: {len(done)} of {len(asked)} seeds"
    else:
        said = intervals.verdict(difference, study.margin)
    return Comparison(rival, arm, values, difference, p_value(values) if values else None, said)


def _row(study: Study, results: Results, cell: Cell) -> Row:
    tuning = results.tuning(cell, study.extensions)
    finals = results.finals(cell, study.extensions)
    base_cell = study.cell(study.baseline, cell.place)
    assert base_cell is not None
    base = results.finals(base_cell, study.extensions)
    comparison = None if cell is base_cell else _compare(study, results, cell, base_cell)
    pairs = _pairs(finals, base)
    loss = reached = None
    if pairs:
        loss = statistics.fmean(_loss(r) for r in base.values() if r.loss is not None)
        if comparison and comparison.difference:
            loss += comparison.difference.mean
        curve = _curve([a.curve for a, _ in pairs], study.confidence)
        reached = _reached(curve, statistics.fmean(_loss(b) for _, b in pairs))
    return Row(cell, tuning, finals, comparison, loss, reached, _gap(pairs, study.confidence))


def _pairs(arm: Mapping[int, Record], base: Mapping[int, Record]) -> list[tuple[Record, Record]]:
    """Runs of both on common seeds, where neither diverged."""
    both = [(arm[seed], base[seed]) for seed in arm if seed in base]
    return [(a, b) for a, b in both if a.loss is not None and b.loss is not None]


def _loss(record: Record) -> float:
    assert record.loss is not None
    return record.loss


def _gap(pairs: Iterable[tuple[Record, Record]], confidence: float) -> list[CurvePoint]:
    curves = []
    for a, b in pairs:
        other = {point[0]: point[1] for point in b.curve}
        curves.append([[n, loss - other[n]] for n, loss in a.curve if n in other])
    return _curve(curves, confidence)


def _curve(curves: Sequence[Sequence[Sequence[float]]], confidence: float) -> list[CurvePoint]:
    """The mean of curves at the tokens that all have."""
    tables = [{int(n): value for n, value in curve} for curve in curves]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [CurvePoint(n, interval([t[n] for t in tables], confidence)) for n in shared]


def _reached(curve: Sequence[CurvePoint], loss: float) -> float | None:
    """Tokens at which a curve first reaches a loss, interpolated linearly between its points."""
    last: CurvePoint | None = None
    for point in curve:
        if point.value.mean <= loss:
            if last is None:
                return float(point.tokens)
            share = (last.value.mean - loss) / (last.value.mean - point.value.mean)
            return last.tokens + share * (point.tokens - last.tokens)
        last = point
    return None
