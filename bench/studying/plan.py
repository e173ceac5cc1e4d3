"""A study: arms at sizes, their runs, and what makes two runs one."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from mlx_mla.errors import UserError
from mlx_mla.fields import PositiveFloat
from mlx_mla.model.config import DType, ModelConfig
from mlx_mla.model.train_config import TrainConfig

Settings = dict[str, Any]
"""Names (`model.n_embd` for the model's own) to values, of a resolved configuration."""

NEUTRAL = frozenset(
    {
        *("preset", "data", "bpe_dir", "device", "activation_checkpointing", "tokens_per_step"),
        *("log_every", "eval_every", "save_every", "keep", "track"),
        *("sample_prompt", "sample_tokens", "sample_every"),
        *("eval_tasks", "eval_limit", "eval_data_dir"),
    }
)
"""What does not change the resulting weights: paths, the device, logging. Data are identified by
their fingerprint."""

RateName = Literal["learning_rate", "muon_learning_rate"]
Keep = Literal["best", "all", "none"]
Place = tuple[str, int]
"""A size and a budget of tokens, within which arms are compared."""


def settings(config: TrainConfig) -> Settings:
    """Everything that makes a run what it is; two runs of equal settings are one."""
    values = dataclasses.asdict(config)
    model = {f"model.{name}": value for name, value in values.pop("model").items()}
    return {**{k: v for k, v in values.items() if k not in NEUTRAL}, **model}


def filled(values: Mapping[str, Any]) -> Settings:
    """Settings that were saved before a field existed, with that field at its default.

    Settings that the present version does not have are returned as they are, and match no run.
    """
    model = {k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")}
    others = {k: v for k, v in values.items() if not k.startswith("model.")}
    try:
        return settings(TrainConfig(model=ModelConfig(**model), **others).resolved())
    except (TypeError, UserError):  # a field that is gone, or a value that is refused by now
        return dict(values)


def key(values: Mapping[str, Any]) -> str:
    """Settings as text that can be compared and looked up."""
    return json.dumps(values, sort_keys=True)


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
        return self.config.total_tokens

    @property
    def name(self) -> str:
        """Its folder within the folder of runs."""
        start = "" if self.std is None else f"-from-{self.std:g}"
        return f"{self.arm}/{self.size}/{self.tokens}/{self.rate:g}{start}-{self.seed}"

    @property
    def key(self) -> str:
        return key(settings(self.config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """An arm at a size and a budget of tokens: what is tuned, then repeated over seeds."""

    arm: str
    size: str
    config: TrainConfig
    """Resolved, with the steps of the final runs; its rate and seed are placeholders. Rates are
    tried with its `initializer_range`."""
    tune_steps: int
    tune_dtype: DType
    """Of the tuning runs."""
    rates: tuple[float, ...]
    rate_name: RateName
    stds: tuple[float, ...]
    """Values of `initializer_range` to try at the rate found; a single one is not tuned."""
    extensions: int
    """Values that may be added beyond the ends of the rates, and of the stds."""
    seeds: tuple[int, ...]
    tuning_seed: int | None
    """Seed of the tuning runs. None: the first of `seeds`, and rates are not tried again with the
    std found; studies written before there was a choice are read like this."""

    @property
    def tokens(self) -> int:
        """Tokens of a final run."""
        return self.config.total_tokens

    @property
    def place(self) -> Place:
        return self.size, self.tokens

    @property
    def tunes_std(self) -> bool:
        return len(self.stds) > 1

    @property
    def is_tuned(self) -> bool:
        """Whether its rate or its std is to be found."""
        return len(self.rates) > 1 or self.tunes_std

    @property
    def tunes_on_a_result(self) -> bool:
        """Whether a tuning run is also one of the results, as in files without a tuning seed."""
        return self.is_tuned and self.tuning_seed is None

    @property
    def tunes_rate_again(self) -> bool:
        """Whether rates are tried again with the std found."""
        return self.tunes_std and len(self.rates) > 1 and self.tuning_seed is not None

    @property
    def owned(self) -> frozenset[str]:
        """Settings that the study chooses, run by run."""
        std = {"initializer_range"} if self.tunes_std else set()
        return frozenset({"steps", "seed", self.rate_name, *std})

    @property
    def least(self) -> dict[str, list[Run]]:
        """The runs that it takes at least, by the stage of tuning, then the final ones; rates and
        stds that are to be found are placeholders."""
        rate, std = self.rates[0], self.stds[0]
        return {
            "rate": [self.tuning(r) for r in self.rates] if len(self.rates) > 1 else [],
            "std": [self.tuning(rate, s) for s in self.stds] if self.tunes_std else [],
            "rate again": [self.tuning(rate)] * 3 if self.tunes_rate_again else [],
            "final": [self.final(rate, std, seed) for seed in self.seeds],
        }

    def final(self, rate: float, std: float, seed: int) -> Run:
        """The run of a seed at the rate and the std that were found."""
        return self._run(rate, std, seed)

    def tuning(self, rate: float, std: float | None = None) -> Run:
        """The run that tries a rate, or an std at a rate."""
        std = self.config.initializer_range if std is None else std
        seed = self.seeds[0] if self.tuning_seed is None else self.tuning_seed
        return self._run(rate, std, seed, steps=self.tune_steps, dtype=self.tune_dtype)

    def _run(self, rate: float, std: float, seed: int, **changes: Any) -> Run:
        changes |= {self.rate_name: rate, "initializer_range": std, "seed": seed}
        config = dataclasses.replace(self.config, **changes)
        named = None if std == self.config.initializer_range else std
        return Run(self.arm, self.size, config, rate, named, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The speed of a machine, for the dry run."""

    tokens_per_second: dict[str, PositiveFloat]
    """By size."""
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A checked study."""

    title: str
    baseline: str
    primary: tuple[tuple[str, ...], str] | None
    """The comparison that the study is made for: an arm against its rival. Of several arms it is
    the one with the lowest loss in tuning."""
    margin: float
    """Nats that an arm may lose and still count as not worse."""
    confidence: float
    """Of the intervals, such as 0.95."""
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
    def places(self) -> list[Place]:
        return list(dict.fromkeys(cell.place for cell in self.cells))

    def cell(self, arm: str, place: Place) -> Cell | None:
        return next((c for c in self.cells if (c.arm, c.place) == (arm, place)), None)

    def differences(self, cell: Cell) -> dict[str, tuple[Any, Any]]:
        """Every setting in which an arm differs from the base at its size, defaults included:
        (base's, arm's)."""
        base, own = self.bases[cell.size], settings(cell.config)
        return {k: (base[k], own[k]) for k in base if base[k] != own[k] and k not in cell.owned}
