"""results.json of a study: every finished run, so that none is ever repeated, on any machine."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from bench.studying.plan import Cell, Run, Settings, Study, filled, key, settings
from bench.studying.search import Search, around, search
from mlx_mla.errors import UserError
from mlx_mla.fields import (
    Count,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    not_negative,
    read,
    value_of,
)
from mlx_mla.files import write_text
from mlx_mla.model.config import Seed

RESULTS = "results.json"
LARGEST_LOSS = 100.0
"""In nats; a run that ends above has diverged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A finished run, as results.json holds it."""

    arm: str
    size: str
    rate: PositiveFloat
    seed: Seed
    tokens: PositiveInt
    loss: Optional[Annotated[float, not_negative(LARGEST_LOSS)]]
    """Final held-out loss in nats a token; None for a run that diverged."""
    diverged: str = ""
    """How it diverged."""
    curve: list[tuple[Count, NonNegativeFloat]]
    """Tokens and held-out loss, thinned."""
    seconds: NonNegativeFloat = 0.0
    """Of training."""
    tokens_per_second: Optional[NonNegativeFloat] = None
    """The median over the run."""
    threads: Optional[int] = None
    machine: str
    """Name of an entry of `Results.machines`."""
    data_sha256: str
    settings: Settings

    def __post_init__(self) -> None:
        if (self.loss is None) != bool(self.diverged):
            raise ValueError("loss and diverged: one of them must be there, and not both")
        tokens = [point[0] for point in self.curve]
        if any(a >= b for a, b in itertools.pairwise(tokens)):
            raise ValueError("curve: tokens must rise from point to point")
        if self.loss is not None:
            end = self.curve[-1] if self.curve else (0, math.inf)
            if end[0] != self.tokens or abs(end[1] - self.loss) > 1e-5:
                raise ValueError("curve: must end with tokens and loss")

    @property
    def name(self) -> str:
        return f"{self.arm}/{self.size}/{self.tokens}/{self.rate:g}-{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Document:
    """What results.json holds."""

    format: Literal[1] = 1
    machines: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=dict)
    """Those that all runs share."""
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Decoding speeds, which earlier versions measured."""
    runs: list[dict[str, Any]]


Outcome = dict[str, Any]
"""The fields of a record that the run itself decides, from `loss` to `threads`."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A search of a cell's tuning, which begins when the one before it has ended."""

    what: str
    """rate, std or rate again, as in `Cell.least`."""
    search: Search
    run: Callable[[float], Run]
    """The run that tries a value."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the finished runs say about a cell's learning rate and initialization std."""

    cell: Cell
    stages: Sequence[Stage]
    """The stages that have begun."""
    rate: float | None
    std: float | None
    """The values found so far."""

    @property
    def wanted(self) -> list[Run]:
        """Runs that must finish before the final runs are known."""
        return [stage.run(value) for stage in self.stages for value in stage.search.wanted]

    @property
    def tried(self) -> list[Run]:
        """All tuning runs so far, including those that are wanted."""
        return [stage.run(value) for stage in self.stages for value in stage.search.tried]

    @property
    def diverged(self) -> bool:
        """Whether nothing that was tried gave a loss."""
        return not self.wanted and not self.finals

    @property
    def loss(self) -> float:
        """Expected loss of the tuning seed with the values found; infinite while unknown."""
        return math.inf if self.wanted else self.stages[-1].search.loss

    @property
    def finals(self) -> list[Run]:
        """The runs over seeds, in their order; empty before the tuning has ended."""
        if self.wanted or self.rate is None or self.std is None:
            return []
        return [self.cell.final(self.rate, self.std, seed) for seed in self.cell.seeds]


class Results:
    """The finished runs of a folder, looked up by their settings alone.

    So a run is found again whatever its arm is called now, and a changed study keeps those of its
    runs that it still asks for.

    Args:
        out: The study's folder; its results.json is read if it exists.

    Raises:
        UserError: If results.json is damaged; the message names the run and the field.
    """

    def __init__(self, out: Path):
        self.path = out / RESULTS
        document = _Document(runs=[])
        if self.path.exists():
            document = read(_Document, self.path, "restore the file, or give another --out")
        self.machines, self._measured = document.machines, document.measured
        self.records: list[Record] = []
        for number, values in enumerate(document.runs, 1):
            where = f"{self.path}: run {number}"
            record = value_of(Record, values, where, known_only=True)
            if record.machine not in self.machines:
                raise UserError(
                    f"{where}: machine = {record.machine!r} is not in the file's machines"
                )
            common = {**document.settings, **record.settings}
            self.records.append(dataclasses.replace(record, settings=filled(common)))
        self.data: str | None = None
        """Fingerprint of the data that count; None: those of any."""
        self._index()

    def use_data(self, fingerprint: str) -> None:
        """From now on, only runs on these data count."""
        self.data = fingerprint
        self._index()

    def get(self, run: Run) -> Record | None:
        """The record of a run; None if it has not finished."""
        return self._by_key.get(run.key)

    def add(self, run: Run, found: Outcome, machine: dict[str, str]) -> None:
        """Record a finished run on the data that `use_data` named."""
        assert self.data is not None
        text = key(machine)
        name = next((n for n, facts in self.machines.items() if key(facts) == text), None)
        if name is None:
            name = f"machine-{len(self.machines) + 1}"
            self.machines[name] = machine
        record = Record(
            arm=run.arm, size=run.size, rate=run.rate, seed=run.seed, tokens=run.tokens,
            machine=name, data_sha256=self.data, settings=settings(run.config), **found,
        )  # fmt: skip
        self.records.append(record)
        self._index()
        self.save()

    def save(self) -> None:
        """Replace results.json in one step; settings that all runs share are written once."""
        common = {
            k: v
            for k, v in (self.records[0].settings.items() if self.records else ())
            if all(r.settings.get(k, k) == v for r in self.records)
        }
        rows = [
            {k: v for k, v in vars(r).items() if k != "diverged" or v}
            | {"settings": {k: v for k, v in r.settings.items() if k not in common}}
            for r in self.records
        ]
        head = {"format": 1, "machines": self.machines, "settings": common}
        head |= {"measured": self._measured} if self._measured else {}
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "runs": [\n{lines}\n]}}\n'
        write_text(self.path, text)

    def others(self, study: Study) -> list[Record]:
        """Finished runs that count for nothing: of other settings or data, or at a rate or std that
        is no longer the one found. They are kept in the file."""
        tunings = map(self.tuning, study.cells)
        asked = {run.key for found in tunings for run in (*found.tried, *found.finals)}
        return [r for r in self.records if not self._counts(r) or key(r.settings) not in asked]

    def check_data(self, study: Study) -> None:
        """UserError if the study's runs were trained on different data, and no data were named."""
        found = {record.data_sha256: record for record in self._asked(study)}
        if self.data is None and len(found) > 1:
            names = "; ".join(f"{sha[:12]} ({r.name})" for sha, r in found.items())
            raise UserError(
                f"{self.path}: data_sha256 names {len(found)} sets of data: {names}; choose one "
                "with --data"
            )

    def tuning(self, cell: Cell) -> Tuning:
        """What is known of a cell's learning rate and initialization std."""
        stages: list[Stage] = []

        def best(
            what: str, name: str, grid: Sequence[float], run: Callable[[float], Run]
        ) -> float | None:
            found = search(grid, self._losses(run(1.0), name), cell.extensions)
            stages.append(Stage(what, found, run))
            return found.best

        rate, std = best("rate", cell.rate_name, cell.rates, cell.tuning), None
        if rate is not None:
            at_rate = functools.partial(cell.tuning, rate)
            std = cell.stds[0]
            if cell.tunes_std:
                std = best("std", "initializer_range", cell.stds, at_rate)
        if rate is not None and std is not None and cell.tunes_rate_again:
            three = around(stages[0].search.tried, rate)
            at_std = functools.partial(cell.tuning, std=std)
            rate = best("rate again", cell.rate_name, three, at_std)
        return Tuning(cell, stages, rate, std)

    def primary(self, study: Study) -> tuple[Cell, Cell] | None:
        """The arm and the rival of the primary comparison; None without one, and while tuning does
        not say which arm it is."""
        if study.primary is None:
            return None
        (place,) = study.places
        arms, rival = study.primary
        tunings = [self.tuning(cell) for arm in arms if (cell := study.cell(arm, place))]
        against = study.cell(rival, place)
        if against is None or (len(tunings) > 1 and any(tuning.wanted for tuning in tunings)):
            return None
        return min(tunings, key=lambda tuning: tuning.loss).cell, against

    def finals(self, cell: Cell) -> dict[int, Record]:
        """Finished runs over seeds, with what was found, by seed."""
        found = {run.seed: self.get(run) for run in self.tuning(cell).finals}
        return {seed: record for seed, record in found.items() if record is not None}

    def _asked(self, study: Study) -> Iterable[Record]:
        """Records of the study's runs, at any rate and std, on any data."""
        asked: dict[frozenset[str], set[str]] = {}
        for cell in study.cells:
            for run in (cell.tuning(1.0), *(cell.final(1.0, cell.stds[0], s) for s in cell.seeds)):
                chosen = cell.owned - {"steps", "seed"}
                asked.setdefault(chosen, set()).add(_without(settings(run.config), chosen))
        for r in self.records:
            if any(_without(r.settings, chosen) in those for chosen, those in asked.items()):
                yield r

    def _losses(self, run: Run, name: str) -> dict[float, float]:
        """Losses of the finished runs that differ from one in a setting alone, by the setting."""
        own = settings(run.config)
        return {
            r.settings[name]: math.inf if r.loss is None else r.loss
            for r in self._by_key.values()
            if name in r.settings and r.settings == {**own, name: r.settings[name]}
        }

    def _index(self) -> None:
        self._by_key: dict[str, Record] = {}
        seen: dict[tuple[str, str], int] = {}
        for number, r in enumerate(self.records, 1):
            run = key(r.settings)
            first = seen.setdefault((run, r.data_sha256), number)
            before = self.records[first - 1]
            if before.loss != r.loss:
                raise UserError(
                    f"{self.path}: runs {first} and {number} ({r.name}) are one, with loss "
                    f"{before.loss} and {r.loss}; remove the wrong one"
                )
            if self._counts(r):
                self._by_key[run] = r

    def _counts(self, record: Record) -> bool:
        return self.data in (None, record.data_sha256)


def thinned(points: Sequence[Any], count: int = 64) -> list[Any]:
    """At most `count` evenly spaced points of a curve, including the last."""
    if len(points) <= count:
        return list(points)
    return [points[-1 - i * (len(points) - 1) // (count - 1)] for i in range(count)][::-1]


def _without(values: dict[str, Any], names: Set[str]) -> str:
    """A run's settings as text, except for some."""
    return key({k: v for k, v in values.items() if k not in names})
