"""A study: arms at sizes, their runs, and the rule of the verdict."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from bench.studying.settings import Settings, differences, key, settings
from mlx_mla.config import TrainConfig

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
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens that it trains on."""
        return self.config.steps * self.config.step_tokens

    @property
    def name(self) -> str:
        """Where it stands in the folder of runs."""
        return f"{self.arm}/{self.size}/{self.tokens}/{self.rate:g}-{self.seed}"

    @property
    def key(self) -> str:
        return key(settings(self.config))


@dataclasses.dataclass(frozen=True)
class Cell:
    """An arm at a size and a budget of tokens: what is tuned, then repeated over seeds."""

    arm: str
    size: str
    config: TrainConfig
    """Resolved, with the steps of the final runs; its rate and seed are placeholders."""
    tune_steps: int
    rates: tuple[float, ...]
    rate_name: RateName
    seeds: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a final run."""
        return self.config.steps * self.config.step_tokens

    @property
    def key(self) -> str:
        """What makes the cell what it is, its rate and seed apart."""
        return key(settings(self.config))

    def final(self, rate: float, seed: int) -> Run:
        """The run of a seed at the rate that was found."""
        return self._run(rate, seed, self.config.steps)

    def tuning(self, rate: float) -> Run:
        """The run that tries a rate, with the first seed."""
        return self._run(rate, self.seeds[0], self.tune_steps)

    def _run(self, rate: float, seed: int, steps: int) -> Run:
        changes: dict[str, Any] = {self.rate_name: rate, "seed": seed, "steps": steps}
        config = dataclasses.replace(self.config, **changes)
        return Run(self.arm, self.size, config, rate, seed)


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
    """Rates that may be added beyond the ends of a grid."""
    keep: Keep
    """Runs whose weights stay: the first seed's at the rate found, all, none."""
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
        owned = {"steps", "seed", cell.rate_name}
        both = differences(base, settings(cell.config))
        return {k: v for k, v in both.items() if k not in owned}
