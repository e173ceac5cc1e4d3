"""Reading a study's TOML file and checking it."""

import dataclasses
import itertools
import math
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, Union

from bench.studying.plan import (
    Cell,
    Keep,
    Machine,
    RateName,
    Settings,
    Study,
    key,
    settings,
)
from mlx_mla.data.tokenizer import get_tokenizer
from mlx_mla.errors import UserError, nearest
from mlx_mla.fields import (
    PositiveFloat,
    PositiveInt,
    fraction,
    not_negative,
    positive,
    read,
    value_of,
)
from mlx_mla.model.config import TOKENIZER_IDS, DType, Seed
from mlx_mla.model.presets import overlay, preset
from mlx_mla.model.train_config import TrainConfig

T = TypeVar("T")
PAIRED = (
    *("tokenizer", "val_fraction", "batch_size", "grad_accum_steps", "seq_len"),
    *("eval_batches", "final_eval_batches"),
)
"""Settings that all arms share, so that at a seed they see the same data and held-out windows."""

QUICK_STEPS, QUICK_VALUES, QUICK_SEEDS = 20, 3, 2

_Rates = list[PositiveFloat]
_Stds = list[Annotated[float, positive(100)]]
_Share = fraction("be a share such as 0.005", above_0=True, below_1=True)

# The tables of the file; fields without a default are required.


@dataclasses.dataclass(kw_only=True)
class _Verdict:
    margin: Annotated[float, _Share] = 0.005
    confidence: Annotated[float, _Share] = 0.95


@dataclasses.dataclass(kw_only=True)
class _File:
    title: str = ""
    baseline: str
    primary: Optional[tuple[Union[str, list[str]], str]] = None
    rivals: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    stair: list[str] = dataclasses.field(default_factory=list)
    """Arms that are each compared with the one before; of files for an earlier version."""
    extensions: Annotated[int, not_negative(10)] = 3
    keep: Keep = "best"
    verdict: _Verdict = dataclasses.field(default_factory=_Verdict)
    evaluate: Any = None  # of files written for an earlier version; not used
    machines: dict[str, Machine] = dataclasses.field(default_factory=dict)
    base: dict[str, Any]
    sizes: dict[str, dict[str, Any]]
    arms: dict[str, dict[str, Any]]


@dataclasses.dataclass(kw_only=True)
class _Tuned:
    """What a size says of its runs, and an arm may say otherwise."""

    tokens: Union[PositiveInt, list[PositiveInt]]
    learning_rates: _Rates
    initializer_ranges: Optional[_Stds] = None
    seeds: list[Seed]

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers, not {self.seeds}")
        if len(self.learning_rates) != 1:  # which is known beforehand, and reported as not tuned
            _check_grid(self.learning_rates, 4, "learning_rates", "or one, not tuned")
        if self.initializer_ranges is not None:
            otherwise = "initializer_range sets one"
            _check_grid(self.initializer_ranges, 3, "initializer_ranges", otherwise)


def _check_grid(values: list[float], least: int, name: str, otherwise: str) -> None:
    steps = [high / low for low, high in itertools.pairwise(sorted(values))]
    if len(values) < least or min(steps) < 1.3 or max(steps) > 2.3:
        raise ValueError(
            f"{name} needs at least {least} values a factor of 1.4 to 2 apart ({otherwise}), "
            f"not {', '.join(f'{v:g}' for v in sorted(values))}"
        )


@dataclasses.dataclass(kw_only=True)
class _Size:
    tune_tokens: Optional[PositiveInt] = None
    tune_dtype: Optional[DType] = None
    tuning_seed: Optional[Seed] = None
    arms: Optional[list[str]] = None


@dataclasses.dataclass(kw_only=True)
class _Arm:
    about: str = ""
    rate: RateName = "learning_rate"
    at: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


_TUNED = [field.name for field in dataclasses.fields(_Tuned)]


def read_study(
    path: Path, data: str | None = None, bpe_dir: str | None = None, quick: bool = False
) -> Study:
    """Read and check a study.

    Args:
        path: The TOML file.
        data: What to train on, instead of the file's.
        bpe_dir: Folder of GPT-2's vocabulary, instead of the file's.
        quick: Shrink every run to some steps, and the grids and seeds; see docs/study.md.

    Raises:
        UserError: For anything that the file must not contain; the message names the place.
    """
    places = {"data": data, "bpe_dir": bpe_dir}
    given = {name: place for name, place in places.items() if place is not None}
    study = _Reader(path, given).study()
    return _quick(study) if quick else study


def _quick(study: Study) -> Study:
    """A study with a little of everything, at one budget of tokens a size."""

    def few(warmup_steps: int) -> dict[str, Any]:
        warmup_steps = min(warmup_steps, QUICK_STEPS // 4)
        return {"warmup_steps": warmup_steps, "eval_batches": 2, "final_eval_batches": 2}

    def middle(values: tuple[float, ...]) -> tuple[float, ...]:
        first = max(0, len(values) - QUICK_VALUES) // 2
        return values[first : first + QUICK_VALUES]

    shared = {c.place: c.seeds for c in study.cells if c.arm == study.baseline}
    cells: dict[tuple[str, str], Cell] = {}
    for cell in study.cells:
        seeds = [seed for seed in shared[cell.place] if seed in cell.seeds][:QUICK_SEEDS]
        pace = few(cell.config.warmup_steps)
        pace |= {"eval_every": QUICK_STEPS // 4, "save_every": QUICK_STEPS // 2}
        own = dataclasses.replace(
            cell, config=dataclasses.replace(cell.config, steps=QUICK_STEPS, **pace),
            tune_steps=QUICK_STEPS, rates=middle(cell.rates), stds=middle(cell.stds), extensions=0,
            seeds=tuple(seeds),
        )  # fmt: skip
        cells.setdefault((cell.arm, cell.size), own)
    bases = {size: {**base, **few(base["warmup_steps"])} for size, base in study.bases.items()}
    return dataclasses.replace(study, cells=tuple(cells.values()), bases=bases, quick=True)


class _Reader:
    """Turns the tables of a TOML file into a study; `where` in messages is file and table."""

    def __init__(self, path: Path, places: dict[str, str]):
        self.path, self.where = path, str(path)
        self.file = read(_File, path, known_only=True)
        self.arms = self._tables(_Arm, self.file.arms, "arms")
        self.sizes = self._tables(_Size, self.file.sizes, "sizes")
        base = {**self.file.base, **places}
        self._check_not_owned(base, "base", "learning_rate")
        self.given = set(base)
        start = preset(base["preset"]) if isinstance(base.get("preset"), str) else TrainConfig()
        self.base = overlay(start, base, f"{self.where} [base]")
        self.base.make_paths_absolute()
        self.bases: dict[str, Settings] = {}

    def _tables(
        self, cls: type[T], tables: Mapping[str, dict[str, Any]], kind: str
    ) -> dict[str, tuple[T, dict[str, Any]]]:
        """Of each table the fields of `cls`, and the other keys, which are settings of runs."""
        own = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        found = {}
        for name, values in tables.items():
            where = f"{self.where} [{kind}.{name}]"
            if not name or re.search(r"[/\s]", name) or name.startswith("."):
                raise UserError(f"{where}: names a folder; use letters, digits and -")
            mine, others = _split(values, own)
            found[name] = (value_of(cls, mine, where), others)
        if not tables or len({name.casefold() for name in tables}) < len(tables):
            # On a Mac, folders whose names differ in capitals alone are one.
            raise UserError(
                f"{self.where}: {kind} must have names, which differ in more than capitals"
            )
        return found

    def study(self) -> Study:
        file = self.file
        (baseline,) = self._names([file.baseline], "baseline")
        for name, machine in file.machines.items():
            self._names(list(machine.tokens_per_second), f"[machines.{name}]", "sizes")
        for name, (arm, _) in self.arms.items():
            self._names(list(arm.at), f"[arms.{name}.at]", "sizes")
        stair = itertools.pairwise(self._names(file.stair, "stair"))
        rivals = [*stair, *(self._names(pair, "rivals") for pair in file.rivals)]
        primary: tuple[tuple[str, ...], str] | None = None
        if file.primary is not None:
            first, rival = file.primary
            primary = self._names([first] if isinstance(first, str) else first, "primary"), rival
            self._names([*primary[0], rival], "primary")
        cells = [cell for size in self.sizes for cell in self._cells_of(size, baseline)]
        if primary:
            self._check_primary(primary, cells)
        return Study(
            title=file.title or self.path.stem,
            baseline=baseline,
            primary=primary,
            margin=math.log1p(file.verdict.margin),
            confidence=file.verdict.confidence,
            keep=file.keep,
            arms={name: arm.about for name, (arm, _) in self.arms.items()},
            pairs=tuple((a, b) for a, b in rivals),
            cells=tuple(cells),
            bases=self.bases,
            machines=file.machines,
            quick=False,
        )

    def _check_primary(self, primary: tuple[tuple[str, ...], str], cells: Sequence[Cell]) -> None:
        arms, rival = primary
        if len({cell.place for cell in cells}) > 1:
            raise UserError(
                f"{self.where}: primary is one comparison; it needs a study of one size and budget"
            )
        named = {cell.arm: cell for cell in cells if cell.arm in (*arms, rival)}
        for name in (*arms, rival):
            if name not in named:
                raise UserError(f"{self.where}: primary: {name} is not among the size's arms")
        for cell in (named[name] for name in arms if len(arms) > 1):
            if cell.tuning_seed is None or not cell.is_tuned:
                raise UserError(
                    f"{self.where}: primary: {cell.arm} is chosen by its loss in tuning, which "
                    "needs a tuning_seed, and several learning_rates or initializer_ranges"
                )

    def _cells_of(self, size: str, baseline: str) -> list[Cell]:
        where = f"{self.where} [sizes.{size}]"
        own, values = self.sizes[size]
        tuned, values = _split(values, _TUNED)
        self._check_not_owned(values, f"sizes.{size}", "learning_rate")
        config = overlay(self.base, values, where)
        given = self.given | values.keys()
        evaluated = config.eval_batches if "eval_batches" in given else 20
        # No samples and one checkpoint, where the study does not ask for more.
        quiet = {"sample_tokens": 0, "keep": 1, "eval_batches": 20, "final_eval_batches": evaluated}
        for field in quiet.keys() - given:
            setattr(config, field, quiet[field])
        if config.eval_batches != config.final_eval_batches:
            raise UserError(
                f"{where}: eval_batches and final_eval_batches must be equal, so that the end of a "
                "curve is the loss that the verdict is about"
            )
        self.bases[size] = settings(_resolved(config, where))
        names = self._names(own.arms or list(self.arms), f"[sizes.{size}] arms")
        if baseline not in names:
            raise UserError(f"{where}: arms must hold the baseline, {baseline}; add it")
        cells = [cell for name in names for cell in self._cells(name, size, config, own, tuned)]
        self._check_distinct(cells, baseline, size)
        if not any(cell.is_tuned for cell in cells):
            for name in ("tune_tokens", "tune_dtype", "tuning_seed"):
                if getattr(own, name) is not None:
                    raise UserError(
                        f"{where}: {name} is for tuning, and no arm has several learning_rates or "
                        "initializer_ranges; remove it"
                    )
        compared = {cell.tokens: set(cell.seeds) for cell in cells if cell.arm == baseline}
        for cell in cells:
            if cell.tokens not in compared:
                raise UserError(
                    f"{where}: {cell.arm} trains on {cell.tokens:,} tokens, which the baseline, "
                    f"{baseline}, does not; give both the same"
                )
            if not compared[cell.tokens] & set(cell.seeds):
                raise UserError(f"{where}: {cell.arm} has no seed in common with {baseline}")
        return cells

    def _cells(
        self, name: str, size: str, base: TrainConfig, own: _Size, tuned: Mapping[str, Any]
    ) -> list[Cell]:
        arm, values = self.arms[name]
        where = f"{self.where} [arms.{name}]"
        changed, here = _split(arm.at.get(size, {}), _TUNED)
        for changes, place in ((values, f"arms.{name}"), (here, f"arms.{name}.at.{size}")):
            self._check_not_owned(changes, place, arm.rate)
            if changes.keys() & {"preset", "data"}:
                raise UserError(f"{self.where} [{place}]: preset and data belong under [base]")
        config = overlay(base, values, where)
        config = overlay(config, here, f"{self.where} [arms.{name}.at.{size}]")
        config = _resolved(config, f"{where} at size {size}")
        if arm.rate == "muon_learning_rate" and config.optimizer != "muon":
            raise UserError(f"{where}: rate = {arm.rate!r} goes with optimizer = 'muon'")
        for field in PAIRED:
            if settings(config)[field] != self.bases[size][field]:
                raise UserError(
                    f"{where}: {field} must be the same for all arms, which see the same data and "
                    "held-out windows; set it under [base] or [sizes]"
                )
        where = f"{self.where} [sizes.{size}]"
        mine: _Tuned = value_of(_Tuned, {**tuned, **changed}, where)
        budgets = mine.tokens if isinstance(mine.tokens, list) else [mine.tokens]
        steps = [_steps(config, n, f"{where}: tokens") for n in budgets]
        if not steps or len(set(steps)) < len(steps):
            raise UserError(f"{where}: tokens must be one budget, or several that differ")
        if own.tuning_seed in mine.seeds:
            raise UserError(
                f"{where}: tuning_seed {own.tuning_seed} is one of {name}'s seeds; results must "
                "not include the run that tuning chose, so use another seed"
            )
        given = self.given | self.sizes[size][1].keys()
        cells = []
        for count in steps:
            final = dataclasses.replace(config, steps=count)
            for field, times in {"eval_every": 20, "save_every": 20, "log_every": 100}.items():
                if field not in given:
                    setattr(final, field, max(1, count // times))
            tune = own.tune_tokens
            tuning = count if tune is None else _steps(config, tune, f"{where}: tune_tokens")
            cell = Cell(
                arm=name, size=size, config=final, tune_steps=tuning, rate_name=arm.rate,
                rates=tuple(sorted(mine.learning_rates)), seeds=tuple(mine.seeds),
                stds=tuple(sorted(mine.initializer_ranges or [config.initializer_range])),
                tuning_seed=own.tuning_seed, extensions=self.file.extensions,
                tune_dtype=own.tune_dtype or config.dtype,
            )  # fmt: skip
            cells.append(cell)
        return cells

    def _check_distinct(self, cells: Sequence[Cell], baseline: str, size: str) -> None:
        """Refuse an arm that is another's twin, or changes nothing."""
        where = f"{self.where} [arms]"
        base = {**self.bases[size], "steps": 0}
        seen: dict[str, str] = {}
        for cell in cells:
            own = {**settings(cell.config), "steps": 0}
            if cell.arm != baseline and own == base:
                raise UserError(f"{where}: {cell.arm} changes nothing of the base at size {size}")
            twin = seen.setdefault(key(own), cell.arm)
            if twin != cell.arm:
                raise UserError(
                    f"{where}: {cell.arm} is the twin of {twin} at size {size}; remove one"
                )

    def _check_not_owned(self, values: Mapping[str, Any], where: str, rate_name: str) -> None:
        for name, source in (
            ("steps", "tokens of a size"),
            ("seed", "seeds of a size"),
            (rate_name, "learning_rates of a size"),
        ):
            if name in values:
                raise UserError(f"{self.where} [{where}]: {name} comes from {source}; remove it")
        for name in _TUNED:
            if name in values:
                raise UserError(
                    f"{self.where} [{where}]: {name} belongs under [sizes.SIZE], or under "
                    f"[arms.ARM] as at.SIZE.{name}"
                )

    def _names(self, names: Sequence[str], where: str, known: str = "arms") -> tuple[str, ...]:
        """Names of arms or sizes, which must exist and differ."""
        one = {"arms": "an arm", "sizes": "a size"}[known]
        for name in names:
            if name not in getattr(self, known):
                hint = nearest(name, getattr(self, known))
                raise UserError(f"{self.where}: {where}: {name!r} is not {one}; {hint}")
        if len(set(names)) < len(names):
            raise UserError(f"{self.where}: {where} names {one} twice; remove one")
        return tuple(names)


def _split(
    values: Mapping[str, Any], names: Container[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values under some names, and the others."""
    own = {k: v for k, v in values.items() if k in names}
    return own, {k: v for k, v in values.items() if k not in own}


def _resolved(config: TrainConfig, where: str) -> TrainConfig:
    try:
        if config.tokenizer in TOKENIZER_IDS:  # "gpt2" may be a download
            return config.resolved()
        return config.resolved(get_tokenizer(config.tokenizer).size)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _steps(config: TrainConfig, tokens: int, where: str) -> int:
    if tokens < config.step_tokens:
        raise UserError(f"{where} must be at least a step's {config.step_tokens:,}, not {tokens:,}")
    return round(tokens / config.step_tokens)
