"""A study: arms at sizes, their runs, and the rule of the verdict."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from bench.studying.settings import Settings, differences, key, settings
from mlx_mla.fields import PositiveFloat
from mlx_mla.model.train_config import TrainConfig

RateName = Literal["learning_rate", "muon_learning_rate"]
Keep = Literal["best", "all", "none"]
Place = tuple[str, int]
"""A size and a budget of tokens."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    arm: str
    size: str
    config: TrainConfig
    """Resolved, with its rate, seed and steps."""
    rate: float
    std: float | None
    """Initialization std, where it is not the `initializer_range` of its arm."""
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens that it is trained on."""
        return self.config.steps * self.config.step_tokens

    @property
    def name(self) -> str:
        """Its folder within the folder of runs."""
        start = "" if self.std is None else f"-from-{self.std:g}"
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
    stds: tuple[float, ...]
    """Values of `initializer_range` to try at the rate found; a single one is not tuned."""
    seeds: tuple[int, ...]
    tuning_seed: int | None
    """Seed of the tuning runs. None: the first of `seeds`, and rates are not tried again with the
    std found; studies written before there was a choice are read like this."""

    @property
    def tokens(self) -> int:
        """Tokens of a final run."""
        return self.config.steps * self.config.step_tokens

    @property
    def place(self) -> Place:
        """Size and budget, within which arms are compared."""
        return self.size, self.tokens

    @property
    def tunes_std(self) -> bool:
        return len(self.stds) > 1

    @property
    def tunes_rate_again(self) -> bool:
        """Whether rates are tried again with the std found."""
        return self.tunes_std and len(self.rates) > 1 and self.tuning_seed is not None

    @property
    def owned(self) -> frozenset[str]:
        """Settings that the study chooses, run by run."""
        std = {"initializer_range"} if self.tunes_std else set()
        return frozenset({"steps", "seed", self.rate_name, *std})

    def final(self, rate: float, std: float, seed: int) -> Run:
        """The run of a seed at the rate and the std that were found."""
        return self._run(rate, std, seed, self.config.steps)

    def tuning(self, rate: float, std: float | None = None) -> Run:
        """The run that tries a rate, or an std at a rate."""
        std = self.config.initializer_range if std is None else std
        seed = self.seeds[0] if self.tuning_seed is None else self.tuning_seed
        return self._run(rate, std, seed, self.tune_steps)

    def _run(self, rate: float, std: float, seed: int, steps: int) -> Run:
        changes: dict[str, Any] = {self.rate_name: rate, "seed": seed, "steps": steps}
        config = dataclasses.replace(self.config, initializer_range=std, **changes)
        named = None if std == self.config.initializer_range else std
        return Run(self.arm, self.size, config, rate, named, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The speed of a machine, for the dry run."""

    tokens_per_second: dict[str, PositiveFloat]
    """By size."""
    source: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study."""

    name: str
    title: str
    baseline: str
    primary: tuple[tuple[str, ...], str] | None
    """The comparison that the study is made for: an arm against its rival. Of several arms it is
    the one with the lowest loss in tuning."""
    margin: float
    """Nats that an arm may lose and still count as not worse."""
    confidence: float
    """Of the intervals, such as 0.95."""
    extensions: int
    """Values that may be added beyond the ends of a grid."""
    keep: Keep
    """Runs whose weights are kept: the first seed's final runs, all, none."""
    arms: Mapping[str, str]
    """Names to descriptions."""
    pairs: tuple[tuple[str, str], ...]
    """Pairs of arms, each of which compares the second with the first."""
    cells: tuple[Cell, ...]
    bases: Mapping[str, Settings]
    """The base at every size, before the arms."""
    machines: Mapping[str, Machine]
    quick: bool

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(cell.size for cell in self.cells))

    @property
    def places(self) -> list[Place]:
        """Sizes and budgets, within which arms are compared."""
        return list(dict.fromkeys(cell.place for cell in self.cells))

    def cell(self, arm: str, place: Place) -> Cell | None:
        return next((c for c in self.cells if (c.arm, c.place) == (arm, place)), None)

    def differences(self, cell: Cell) -> dict[str, tuple[Any, Any]]:
        """Every setting in which an arm differs from the base at its size, defaults included."""
        both = differences(self.bases[cell.size], settings(cell.config))
        return {k: v for k, v in both.items() if k not in cell.owned}
