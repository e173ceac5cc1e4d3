"""Reading a study's TOML file, and refusing what it must not say."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, get_args

from bench.studying.plan import Cell, Keep, Machine, RateName, Study
from bench.studying.settings import Settings, key, settings
from mlx_mla.errors import UserError, nearest
from mlx_mla.files import read_toml
from mlx_mla.model.config import TrainConfig
from mlx_mla.model.presets import overlay, preset

PAIRED = (
    *("tokenizer", "val_fraction", "batch_size", "grad_accum_steps", "seq_len"),
    *("eval_batches", "final_eval_batches"),
)
"""What all arms have alike, so that at a seed they see the same data and held-out windows."""

OWN_AT_SIZE = ("tokens", "learning_rates", "initializer_ranges", "seeds")
"""What an arm may have otherwise than its size."""

QUICK_STEPS, QUICK_VALUES, QUICK_SEEDS = 20, 3, 2


def read_study(
    path: Path, data: str | None = None, bpe_dir: str | None = None, quick: bool = False
) -> Study:
    """Read and check a study.

    Args:
        path: The TOML file.
        data: What to train on, in place of the file's.
        bpe_dir: Folder of GPT-2's vocabulary, in place of the file's.
        quick: Shrink every run to some steps, and the grids and seeds; see docs/study.md.

    Raises:
        UserError: For anything that the file must not say; the message names the place.
    """
    places = {"data": data, "bpe_dir": bpe_dir}
    given = {name: place for name, place in places.items() if place is not None}
    return _Reader(path, read_toml(path), given, quick).study()


class _Reader:
    """Turns the tables of a TOML file into a study; `where` in messages is file and table."""

    def __init__(self, path: Path, toml: dict[str, Any], places: dict[str, str], quick: bool):
        self.path, self.toml, self.quick = path, toml, quick
        self.where = str(path)
        known = ("title", "baseline", "stair", "rivals", "extensions", "keep", "evaluate")
        _known(toml, (*known, "machines", "verdict", "base", "arms", "sizes"), self.where)
        self.arms: dict[str, dict[str, Any]] = self._table("arms")
        self.sizes: dict[str, dict[str, Any]] = self._table("sizes")
        for kind, table in (("arms", self.arms), ("sizes", self.sizes)):
            for name, values in table.items():
                if not isinstance(values, dict):
                    raise UserError(f"{self.where}: {kind}.{name} must be a table, [{kind}.{name}]")
                if not name or "/" in name or name.startswith("."):
                    raise UserError(
                        f"{self.where}: {kind}.{name!r} names a folder; use letters, digits and -"
                    )
            folded = [name.casefold() for name in table]
            if len(set(folded)) < len(folded):  # folders on a Mac do not tell them apart
                raise UserError(
                    f"{self.where}: two {kind} have names equal but for capitals; rename one"
                )
        base = {**self._table("base"), **places}
        self._not_owned(base, "base", "learning_rate")
        self.given = set(base)
        start = preset(base["preset"]) if "preset" in base else TrainConfig()
        self.base = overlay(start, base, f"{self.where} [base]")
        self.base.make_paths_absolute()
        self.bases: dict[str, Settings] = {}

    def study(self) -> Study:
        toml, where = self.toml, self.where
        rule = self._table("verdict", needed=False)
        _known(rule, ("margin", "confidence"), f"{where} [verdict]")
        margin = _number(rule, "margin", 0.005, f"{where} [verdict]")
        confidence = _number(rule, "confidence", 0.95, f"{where} [verdict]")
        if not 0 < margin < 1 or not 0.5 <= confidence < 1:
            raise UserError(
                f"{where} [verdict]: margin is a share of perplexity such as 0.005, confidence one "
                f"such as 0.95, not {margin} and {confidence}"
            )
        baseline = toml.get("baseline")
        if not isinstance(baseline, str) or baseline not in self.arms:
            raise UserError(
                f"{where}: baseline = {baseline!r} is no arm; {self._arm_hint(baseline)}"
            )
        stair = self._names(toml.get("stair", []), "stair")
        rivals = toml.get("rivals", [])
        if not isinstance(rivals, list):
            raise UserError(f"{where}: rivals must be a list of pairs of arms, not {rivals!r}")
        pairs = tuple(self._names(pair, "rivals") for pair in rivals)
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(f"{where}: each of rivals must be a pair of arms")
        keep = toml.get("keep", "best")
        if keep not in get_args(Keep):
            raise UserError(f"{where}: keep = {keep!r} must be one of {', '.join(get_args(Keep))}")
        extensions = toml.get("extensions", 3)
        if type(extensions) is not int or extensions < 0:
            raise UserError(f"{where}: extensions must be a whole number, not {extensions!r}")
        cells = [cell for size in self.sizes for cell in self._cells_of(size, baseline)]
        return Study(
            name=self.path.stem,
            title=str(toml.get("title", self.path.stem)),
            baseline=baseline,
            margin=math.log1p(margin),
            confidence=confidence,
            extensions=0 if self.quick else extensions,
            keep=keep,
            arms={name: str(arm.get("about", "")) for name, arm in self.arms.items()},
            stair=stair,
            rivals=pairs,
            cells=tuple(cells),
            bases=self.bases,
            machines=self._machines(),
            evaluate=self._evaluate(),
            quick=self.quick,
        )

    def _cells_of(self, size: str, baseline: str) -> list[Cell]:
        where = f"{self.where} [sizes.{size}]"
        table = dict(self.sizes[size])
        own = {name: table.pop(name, None) for name in ("tune_tokens", "arms", *OWN_AT_SIZE)}
        self._not_owned(table, f"sizes.{size}", "learning_rate")
        base = self._watched(overlay(self.base, table, where), self.given | table.keys())
        if self.quick:
            base = _shortened(base)
        if base.eval_batches != base.final_eval_batches:
            raise UserError(
                f"{where}: eval_batches and final_eval_batches must be equal, so that the end of a "
                "curve is the loss that the verdict is about"
            )
        self.bases[size] = settings(_resolved(base, where))
        names = self._names(own.pop("arms") or list(self.arms), f"sizes.{size}.arms")
        if baseline not in names:
            raise UserError(f"{where}: arms must hold the baseline, {baseline}; add it")
        cells = []
        for name in names:
            cells += self._cells(name, size, base, own, where)
        self._distinct(cells, baseline, size)
        compared = {cell.tokens for cell in cells if cell.arm == baseline}
        for cell in cells:
            if cell.tokens not in compared:
                raise UserError(
                    f"{where}: {cell.arm} trains on {cell.tokens:,} tokens, which the baseline, "
                    f"{baseline}, does not; give both the same"
                )
        return cells

    def _cells(
        self, name: str, size: str, base: TrainConfig, own: Mapping[str, Any], where: str
    ) -> list[Cell]:
        arm = dict(self.arms[name])
        arm.pop("about", None)
        rate_name = arm.pop("rate", "learning_rate")
        at = arm.pop("at", {})
        if rate_name not in get_args(RateName):
            raise UserError(
                f"{self.where} [arms.{name}]: rate = {rate_name!r} must be one of "
                f"{', '.join(get_args(RateName))}"
            )
        _known(at, self.sizes, f"{self.where} [arms.{name}.at]")
        here = at.get(size, {})
        _known(here, here, f"{self.where} [arms.{name}.at.{size}]")
        here = dict(here)
        own = {**own, **{k: here.pop(k) for k in OWN_AT_SIZE if k in here}}
        for values, table in ((arm, f"arms.{name}"), (here, f"arms.{name}.at.{size}")):
            self._not_owned(values, table, rate_name)
            if values.keys() & {"preset", "data"}:
                raise UserError(f"{self.where} [{table}]: preset and data belong under [base]")
        config = overlay(base, arm, f"{self.where} [arms.{name}]")
        config = overlay(config, here, f"{self.where} [arms.{name}.at.{size}]")
        config = _resolved(config, f"{self.where} [arms.{name}] at size {size}")
        if rate_name == "muon_learning_rate" and config.optimizer != "muon":
            raise UserError(
                f"{self.where} [arms.{name}]: rate = {rate_name!r} goes with optimizer = 'muon'"
            )
        for field in PAIRED:
            if settings(config)[field] != self.bases[size][field]:
                raise UserError(
                    f"{self.where} [arms.{name}]: {field} must be the same for all arms, which see "
                    "the same data and held-out windows; set it under [base] or [sizes]"
                )
        budgets = own["tokens"] if isinstance(own["tokens"], list) else [own["tokens"]]
        steps = [_steps(config, n, f"{where}: tokens") for n in budgets]
        if not steps or len(set(steps)) < len(steps):
            raise UserError(f"{where}: tokens must be one budget, or several that differ")
        tune = own["tune_tokens"]
        rates = self._rates(own["learning_rates"], f"{where}: learning_rates")
        scales = self._scales(own["initializer_ranges"], config, f"{where}: initializer_ranges")
        seeds = _seeds(own["seeds"], f"{where}: seeds")
        if self.quick:
            steps, tune, seeds = [min(QUICK_STEPS, *steps)], None, seeds[:QUICK_SEEDS]
        given = self.given | self.sizes[size].keys()
        if self.quick:
            given |= {"eval_every", "save_every"}
        cells = []
        for count in steps:
            tuned = count if tune is None else _steps(config, tune, f"{where}: tune_tokens")
            watched = _watched_often(config, count, given)
            final = dataclasses.replace(watched, steps=count)
            cells.append(Cell(name, size, final, tuned, rates, rate_name, scales, seeds))
        return cells

    def _rates(self, values: Any, where: str) -> tuple[float, ...]:
        rates = _positive(values, where)
        # A single rate is one that is known; it is reported as not tuned.
        if len(rates) == 1:
            return rates
        return self._grid(rates, 4, "or one, not tuned", where)

    def _scales(self, values: Any, config: TrainConfig, where: str) -> tuple[float, ...]:
        if values is None:
            return (config.initializer_range,)
        scales = _positive(values, where)
        for scale in scales:
            _resolved(dataclasses.replace(config, initializer_range=scale), where)
        return self._grid(scales, 3, "initializer_range sets one", where)

    def _grid(
        self, values: tuple[float, ...], least: int, otherwise: str, where: str
    ) -> tuple[float, ...]:
        steps = [high / low for low, high in itertools.pairwise(values)]
        if len(values) < least or min(steps) < 1.3 or max(steps) > 2.3:
            raise UserError(
                f"{where} needs at least {least} values a factor of 1.4 to 2 apart ({otherwise}), "
                f"not {', '.join(f'{v:g}' for v in values)}"
            )
        if not self.quick:
            return values
        first = (len(values) - QUICK_VALUES) // 2
        return values[first : first + QUICK_VALUES]

    @staticmethod
    def _watched(config: TrainConfig, given: Set[str]) -> TrainConfig:
        """No samples and one checkpoint, where the study does not ask for more."""
        quiet = {"sample_tokens": 0, "keep": 1, "eval_batches": 20}
        quiet["final_eval_batches"] = config.eval_batches if "eval_batches" in given else 20
        return overlay(config, {k: v for k, v in quiet.items() if k not in given}, "the study")

    def _distinct(self, cells: Sequence[Cell], baseline: str, size: str) -> None:
        """Refuse an arm that is another's twin, or changes nothing."""
        where = f"{self.where} [arms]"
        base = {**self.bases[size], "steps": 0}
        seen = dict[str, str]()
        for cell in cells:
            own = {**settings(cell.config), "steps": 0}
            if cell.arm != baseline and own == base:
                raise UserError(f"{where}: {cell.arm} changes nothing of the base at size {size}")
            twin = seen.setdefault(key(own), cell.arm)
            if twin != cell.arm:
                raise UserError(
                    f"{where}: {cell.arm} is the twin of {twin} at size {size}; remove one"
                )

    def _not_owned(self, values: Mapping[str, Any], table: str, rate_name: str) -> None:
        for name, source in (
            ("steps", "tokens of a size"),
            ("seed", "seeds of a size"),
            (rate_name, "learning_rates of a size"),
        ):
            if name in values:
                raise UserError(f"{self.where} [{table}]: {name} comes from {source}; remove it")

    def _machines(self) -> tuple[Machine, ...]:
        machines = []
        for name, values in self._table("machines", needed=False).items():
            where = f"{self.where} [machines.{name}]"
            _known(values, ("tokens_per_second", "source"), where)
            rates = values.get("tokens_per_second")
            if not isinstance(rates, dict) or not isinstance(values.get("source"), str):
                raise UserError(f"{where}: needs tokens_per_second = {{SIZE = N}} and a source")
            _known(rates, self.sizes, f"{where}: tokens_per_second")
            speeds = {s: _number(rates, s, 0, where) for s in rates}
            if min(speeds.values(), default=0) <= 0:
                raise UserError(f"{where}: tokens_per_second must be positive")
            machines.append(Machine(name, speeds, values["source"]))
        return tuple(machines)

    def _evaluate(self) -> dict[str, Any]:
        values = self._table("evaluate", needed=False)
        _known(values, ("tasks", "limit", "data_dir", "window"), f"{self.where} [evaluate]")
        return values

    def _table(self, name: str, needed: bool = True) -> dict[str, Any]:
        values = self.toml.get(name, {})
        if not isinstance(values, dict) or (needed and not values):
            raise UserError(f"{self.where}: needs a table [{name}] that says something")
        return values

    def _names(self, values: Any, what: str) -> tuple[str, ...]:
        if not isinstance(values, list):
            raise UserError(f"{self.where}: {what} must be a list of arms")
        for name in values:
            if not isinstance(name, str) or name not in self.arms:
                raise UserError(f"{self.where}: {what}: {name!r} is no arm; {self._arm_hint(name)}")
        if len(set(values)) < len(values):
            raise UserError(f"{self.where}: {what} names an arm twice; remove one")
        return tuple(values)

    def _arm_hint(self, name: Any) -> str:
        return nearest(str(name), self.arms)


def _shortened(config: TrainConfig) -> TrainConfig:
    """For --quick: a warm-up and measurements that suit some steps."""
    return dataclasses.replace(
        config,
        warmup_steps=min(config.warmup_steps, QUICK_STEPS // 4),
        eval_batches=2,
        final_eval_batches=2,
        eval_every=QUICK_STEPS // 4,
        save_every=QUICK_STEPS // 2,
    )


def _watched_often(config: TrainConfig, steps: int, given: Set[str]) -> TrainConfig:
    """Twenty points of the curve and as many checkpoints, where the study does not say."""
    often = {"eval_every": max(1, steps // 20), "save_every": max(1, steps // 20)}
    often["log_every"] = max(1, steps // 100)
    return overlay(config, {k: v for k, v in often.items() if k not in given}, "the study")


def _resolved(config: TrainConfig, where: str) -> TrainConfig:
    try:
        return config.resolved()
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _steps(config: TrainConfig, tokens: Any, where: str) -> int:
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < config.step_tokens:
        raise UserError(
            f"{where} must be a whole number, at least a step's {config.step_tokens:,}, "
            f"not {tokens!r}"
        )
    return round(tokens / config.step_tokens)


def _positive(values: Any, where: str) -> tuple[float, ...]:
    numbers = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values
    )
    if not numbers or not values:
        raise UserError(f"{where} must be a list of positive numbers, not {values!r}")
    return tuple(sorted(float(v) for v in values))


def _seeds(values: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )
    if not whole or not values or len(set(values)) < len(values):
        raise UserError(f"{where} must be a list of different whole numbers, not {values!r}")
    return tuple(values)


def _known(values: Any, known: Any, where: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a table")
    for name in values:
        if name not in known:
            raise UserError(f"{where}: unknown key {name!r}; {nearest(name, known)}")


def _number(values: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = values.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{where}: {name} must be a number, not {value!r}")
    return float(value)
