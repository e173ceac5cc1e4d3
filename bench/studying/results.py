"""results.json of a study: every finished run, so that none is ever repeated, on any machine."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from bench.studying.plan import Cell, Run, Study
from bench.studying.search import Search, search
from bench.studying.settings import filled, key, settings
from mlx_mla.errors import UserError
from mlx_mla.files import write_text

RESULTS = "results.json"
FORMAT = 1

Record = dict[str, Any]
"""A finished run: its settings, `loss` or `diverged`, `curve` of [tokens, held-out loss], and where
and how fast it was trained."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is known of what is tuned for a cell."""

    cell: Cell
    rate: Search
    scale: Search | None
    """Of the first weights, at the rate found; None before there is one."""

    @property
    def wanted(self) -> list[Run]:
        """Runs that must finish before more can be said."""
        if self.scale is None:
            return [self.cell.tuning(rate) for rate in self.rate.wanted]
        return [self._at(scale) for scale in self.scale.wanted]

    @property
    def tried(self) -> list[Run]:
        """All tuning runs so far, wanted ones among them."""
        rates = self.rate.tried if len(self.cell.rates) > 1 else ()
        runs = [self.cell.tuning(rate) for rate in rates]
        if self.scale is not None and self.cell.tunes_scale:
            runs += [self._at(scale) for scale in self.scale.tried]
        return runs

    @property
    def diverged(self) -> bool:
        """Whether nothing that was tried came to a loss."""
        return not self.wanted and not self.finals

    @property
    def finals(self) -> list[Run]:
        """The runs over seeds, in their order; empty before the tuning has ended."""
        if self.rate.best is None or self.scale is None or self.scale.best is None:
            return []
        best = self.rate.best, self.scale.best
        return [self.cell.final(*best, seed) for seed in self.cell.seeds]

    def _at(self, scale: float) -> Run:
        assert self.rate.best is not None
        return self.cell.tuning(self.rate.best, scale)


class Results:
    """The finished runs of a folder, looked up by their settings alone.

    So a run is known again whatever became of its arm's name, and a changed study keeps those of
    its runs that are still asked for.

    Args:
        out: The study's folder; its results.json is read if it is there.
    """

    def __init__(self, out: Path):
        self.path = out / RESULTS
        document = _read(self.path)
        common = document["settings"]
        self.records: list[Record] = [
            {**run, "settings": filled({**common, **run["settings"]})} for run in document["runs"]
        ]
        self.machines: dict[str, dict[str, str]] = document["machines"]
        self.measured: dict[str, list[dict[str, Any]]] = document["measured"]
        for row in itertools.chain(*self.measured.values()):
            row["key"] = key(filled(json.loads(row["key"])))
        self.summary: dict[str, Any] = document["summary"]
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

    def add(self, run: Run, record: Record, machine: dict[str, str]) -> None:
        """Write a finished run down, on the data that `use_data` named."""
        assert self.data is not None
        text = key(machine)
        name = next((n for n, facts in self.machines.items() if key(facts) == text), None)
        if name is None:
            name = f"machine-{len(self.machines) + 1}"
            self.machines[name] = machine
        where = {"arm": run.arm, "size": run.size, "rate": run.rate, "seed": run.seed}
        self.records.append(
            {**where, "tokens": run.tokens, **record, "machine": name}
            | {"data_sha256": self.data, "settings": settings(run.config)}
        )
        self._index()
        self.save()

    def save(self) -> None:
        """Replace results.json in one step; the settings that all runs share stand there once."""
        all_settings = [r["settings"] for r in self.records]
        common = {
            k: v
            for k, v in (all_settings[0].items() if all_settings else ())
            if all(s.get(k, k) == v for s in all_settings)
        }
        rows = [
            r | {"settings": {k: v for k, v in r["settings"].items() if k not in common}}
            for r in self.records
        ]
        head = {"format": FORMAT, "machines": self.machines, "settings": common}
        head |= {"summary": self.summary, "measured": self.measured}
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "runs": [\n{lines}\n]}}\n'
        write_text(self.path, text)

    def others(self, study: Study) -> list[Record]:
        """Finished runs that the study does not ask for: settings that were changed since, or
        other data. They stay in the file and count for nothing."""
        asked: dict[frozenset[str], set[str]] = {}
        for cell in study.cells:
            chosen = cell.owned - {"steps"}
            for run in (cell.tuning(1.0), cell.final(1.0, cell.scales[0], cell.seeds[0])):
                asked.setdefault(chosen, set()).add(_without(settings(run.config), chosen))
        return [
            r
            for r in self.records
            if not self._counts(r)
            or all(_without(r["settings"], chosen) not in those for chosen, those in asked.items())
        ]

    def tuning(self, cell: Cell, extensions: int) -> Tuning:
        """What is known of a cell's learning rate and the scale of its first weights."""
        losses = self._losses(cell.tuning(1.0), cell.rate_name)
        rate = search(cell.rates, losses, extensions)
        if rate.best is None:
            return Tuning(cell, rate, None)
        losses = self._losses(cell.tuning(rate.best), "initializer_range")
        return Tuning(cell, rate, search(cell.scales, losses, extensions))

    def finals(self, cell: Cell, extensions: int) -> dict[int, Record]:
        """Finished runs over seeds, with what was found, by seed."""
        found = {run.seed: self.get(run) for run in self.tuning(cell, extensions).finals}
        return {seed: record for seed, record in found.items() if record is not None}

    def _losses(self, run: Run, name: str) -> dict[float, float]:
        """Losses of the finished runs that differ from one in a setting alone, by the setting."""
        asked = _without(settings(run.config), {name})
        return {
            r["settings"][name]: loss_of(r)
            for r in self._counting
            if _without(r["settings"], {name}) == asked
        }

    def _index(self) -> None:
        self._counting = [r for r in self.records if self._counts(r)]
        self._by_key = {key(r["settings"]): r for r in self._counting}

    def _counts(self, record: Record) -> bool:
        return self.data in (None, record["data_sha256"])


def loss_of(record: Record) -> float:
    """Final held-out loss in nats a token; infinite for a run that diverged."""
    loss: float | None = record["loss"]
    return math.inf if loss is None else loss


def thinned(points: Sequence[Any], count: int = 64) -> list[Any]:
    """At most `count` points of a curve, evenly, the last among them."""
    if len(points) <= count:
        return list(points)
    return [points[-1 - i * (len(points) - 1) // (count - 1)] for i in range(count)][::-1]


def diverged(records: Iterable[Record]) -> list[Record]:
    """Those that have no loss."""
    return [r for r in records if r["loss"] is None]


def _without(values: dict[str, Any], names: Set[str]) -> str:
    """A run's settings as text, but for some."""
    return key({k: v for k, v in values.items() if k not in names})


def _read(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "machines": {},
        "settings": {},
        "summary": {},
        "measured": {},
        "runs": [],
    }
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return empty
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise UserError(
                f"{path}: format {document['format']}, and this version reads {FORMAT}; give "
                "another --out"
            )
        for run in document["runs"]:
            if missing := {"arm", "size", "loss", "settings", "data_sha256"} - run.keys():
                raise KeyError(missing)
        return {name: document[name] for name in empty}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{path}: is no results.json of a study ({type(e).__name__}); restore it, or give "
            "another --out"
        ) from None
