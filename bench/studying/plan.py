"""A study: arms at sizes, their runs, and the rule of the verdict."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from bench.studying.settings import Settings, differences, key, settings
from mlx_mla.model.config import TrainConfig

RateName = Literal["learning_rate", "muon_learning_rate"]
Keep = Literal["best", "all", "none"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    arm: str
    size: str
    config: TrainConfig
    """Resolved, with its rate, seed and steps."""
    rate: float
    scale: float | None
    """Of the first weights, where it is not the `initializer_range` of its arm."""
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        return self.config.steps * self.config.step_tokens

    @property
    def name(self) -> str:
        """Where it stands in the folder of runs."""
        start = "" if self.scale is None else f"-from-{self.scale:g}"
        return f"{self.arm}/{self.size}/{self.tokens}/{self.rate:g}{start}-{self.seed}"

    @property
    def key(self) -> str:
        return key(settings(self.config))


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm at a size and a budget of tokens: what is tuned, then repeated over seeds."""

    arm: str
    size: str
    config: TrainConfig
    """Resolved, with the steps of the final runs; its rate and seed are placeholders. Rates are
    tried with its `initializer_range`."""
    tune_steps: int
    rates: tuple[float, ...]
    rate_name: RateName
    scales: tuple[float, ...]
    """Of the first weights (`initializer_range`), tried at the rate found; a single one is taken as
    it is."""
    seeds: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a final run."""
        return self.config.steps * self.config.step_tokens

    @property
    def key(self) -> str:
        """What makes the cell what it is, apart from what the study chooses."""
        return key(settings(self.config))

    @property
    def tunes_scale(self) -> bool:
        return len(self.scales) > 1

    @property
    def owned(self) -> frozenset[str]:
        """Settings that the study chooses, run by run."""
        scale = {"initializer_range"} if self.tunes_scale else set()
        return frozenset({"steps", "seed", self.rate_name, *scale})

    def final(self, rate: float, scale: float, seed: int) -> Run:
        """The run of a seed at the rate and the scale that were found."""
        return self._run(rate, scale, seed, self.config.steps)

    def tuning(self, rate: float, scale: float | None = None) -> Run:
        """The run that tries a rate, or a scale at a rate, with the first seed."""
        scale = self.config.initializer_range if scale is None else scale
        return self._run(rate, scale, self.seeds[0], self.tune_steps)

    def _run(self, rate: float, scale: float, seed: int, steps: int) -> Run:
        changes: dict[str, Any] = {self.rate_name: rate, "seed": seed, "steps": steps}
        config = dataclasses.replace(self.config, initializer_range=scale, **changes)
        named = None if scale == self.config.initializer_range else scale
        return Run(self.arm, self.size, config, rate, named, seed)


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine is said to do, for the dry run."""

    name: str
    tokens_per_second: Mapping[str, float]
    """By size."""
    source: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study."""

    name: str
    title: str
    baseline: str
    margin: float
    """Nats that an arm may lose and still count as not worse."""
    confidence: float
    """Of the intervals, such as 0.95."""
    extensions: int
    """Values that may be added beyond the ends of a grid."""
    keep: Keep
    """Runs whose weights stay: the first seed's with what was found, all, none."""
    arms: Mapping[str, str]
    """Names to what is said of them."""
    stair: tuple[str, ...]
    """Arms of which each is compared with the one before."""
    rivals: tuple[tuple[str, ...], ...]
    """Pairs of arms of which the second is compared with the first."""
    cells: tuple[Cell, ...]
    bases: Mapping[str, Settings]
    """The base at every size, before the arms."""
    machines: tuple[Machine, ...]
    evaluate: Mapping[str, Any]
    """Options of mlx_mla.evaluate."""
    quick: bool

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(cell.size for cell in self.cells))

    def baseline_of(self, cell: Cell) -> Cell | None:
        """The baseline's cell beside another's."""
        return self.cell(self.baseline, cell.size, cell.tokens)

    def cell(self, arm: str, size: str, tokens: int) -> Cell | None:
        asked = (arm, size, tokens)
        return next((c for c in self.cells if (c.arm, c.size, c.tokens) == asked), None)

    def differences(self, cell: Cell) -> dict[str, tuple[Any, Any]]:
        """Every setting in which an arm differs from the base at its size, defaults included."""
        base = self.bases[cell.size]
        both = differences(base, settings(cell.config))
        return {k: v for k, v in both.items() if k not in cell.owned}
