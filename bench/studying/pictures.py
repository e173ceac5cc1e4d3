"""A study in pictures, one question a picture."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.studying.plan import Place, Study
from bench.studying.summary import Row
from mlx_mla.model.estimate import cache_bytes_per_token
from mlx_mla.pictures import draw as draw_picture
from mlx_mla.pictures import plain

FAR, NEAR_PERCENT = 4, 2
"""An arm is far if its difference is more than FAR times the next smaller one; differences within
NEAR_PERCENT count as equal."""

MOST_CURVES = 6


def draw(study: Study, rows: Sequence[Row], out: Path) -> dict[str, str]:
    """Draw what the rows allow into a folder; returns captions with their files, in order."""
    pictures: dict[str, str] = {}

    def add(caption: str, name: str, paint: Any, width: float, height: float) -> None:
        pictures[caption] = name
        draw_picture(out / name, paint, figsize=(width, height), layout="constrained")

    p = _Pictures(study, rows)
    if not p.places:
        return pictures
    width, height = 2.2 + 2.8 * len(p.places), 1.3 + 0.32 * len(p.arms)
    add("Difference from the baseline", "difference.png", p.forest, width, height)
    add("Loss against cache", "loss-cache.png", p.cache, 7.5, 3.2 * len(p.places))
    for place, here in p.places.items():
        if curves := p.chosen([r for r in here if len(r.gap) > 1]):
            caption = f"Difference against tokens, {_title(place)}"
            name = f"difference-tokens-{place[0]}-{place[1]}.png"
            add(caption, name, functools.partial(p.gap, curves, place), 7.5, 4.2)
    return pictures


def far_arms(differences: Mapping[str, float]) -> set[str]:
    """Arms so far from the baseline that an axis with them would show all others as one.

    Args:
        differences: Mean difference from the baseline in percent, by arm, without the baseline.
    """
    order = sorted(differences, key=lambda arm: abs(differences[arm]))
    reach = float(NEAR_PERCENT)
    for i, arm in enumerate(order):
        if i and abs(differences[arm]) > FAR * reach:
            return set(order[i:])
        reach = max(reach, abs(differences[arm]))
    return set()


def _percent(nats: float) -> float:
    """A difference of losses as a share of perplexity, in percent."""
    return 100 * math.expm1(max(-700.0, min(nats, 700.0)))


def _mean(row: Row) -> float:
    assert row.difference is not None
    return _percent(row.difference.mean)


def _near(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a size and budget that are near the baseline, and those that are far from it."""
    far = far_arms({r.cell.arm: _mean(r) for r in rows})
    return [r for r in rows if r.cell.arm not in far], [r for r in rows if r.cell.arm in far]


def _title(place: Place) -> str:
    return f"{place[0]}, {place[1] / 1e6:.3g} M tokens"


def _label(row: Row) -> str:
    """An arm with its number of seeds, and how many were asked for if more."""
    return f"{plain(row.cell.arm)} (n = {_count(row)})"


def _count(row: Row) -> str:
    done = len(row.comparison.values) if row.comparison else len(row.finals)
    return str(done) if row.finished else f"{done} of {len(row.cell.seeds)}"


def _bytes(row: Row) -> int:
    """Cached for a token, in 16 bits."""
    return cache_bytes_per_token(row.cell.config.model, 2)


def _legend(ax: Any, size: float) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=size, frameon=False)


class _Pictures:
    """What paints the pictures of a study, with one color an arm in all of them."""

    def __init__(self, study: Study, rows: Sequence[Row]):
        from matplotlib import colormaps

        self.study = study
        self.places: dict[Place, list[Row]] = {}
        """Rows with a difference from the baseline."""
        for row in rows:
            if row.difference is not None:
                self.places.setdefault(row.cell.place, []).append(row)
        shown = {row.cell.arm for here in self.places.values() for row in here}
        self.arms = [arm for arm in study.arms if arm in shown]
        self.base = {r.cell.place: r for r in rows if r.comparison is None}
        palette: Any = colormaps["tab20"]
        order = [*range(0, palette.N, 2), *range(1, palette.N, 2)]  # strong colors before pale
        arms = [arm for arm in study.arms if arm != study.baseline]
        self.colors = {arm: palette(order[i % palette.N]) for i, arm in enumerate(arms)}
        self.colors[study.baseline] = "black"

    def forest(self, figure: Any) -> None:
        """Intervals of the final differences: arms from top to bottom, a panel a size and budget,
        one x axis for all panels."""
        axes = figure.subplots(1, len(self.places), sharey=True, sharex=True, squeeze=False)[0]
        limits = self._limits([r for here in self.places.values() for r in _near(here)[0]])
        for ax, (place, here) in zip(axes, self.places.items()):
            self._style(ax, "x")
            far = _near(here)[1]
            ax.set(xlim=limits, title=_title(place), xlabel=self._axis_label)
            for row in here:
                y, color = self.arms.index(row.cell.arm), self.colors[row.cell.arm]
                where = {"transform": ax.get_yaxis_transform(), "va": "center"}
                ax.text(1.0, y, f" n = {_count(row)}", size=7, **where)
                if row in far:
                    above = _mean(row) > 0
                    x, side, arrow = (0.97, "right", "→") if above else (0.03, "left", "←")
                    ax.text(x, y, f"{_mean(row):+.0f} % {arrow}", color=color, ha=side, **where)
                elif (d := row.difference) is not None:
                    if d.count > 1:
                        ax.plot([_percent(d.low), _percent(d.high)], [y, y], color=color, lw=2)
                    self._point(ax, row, _mean(row), y)
        axes[0].set_yticks(range(len(self.arms)), [plain(arm) for arm in self.arms])
        axes[0].set_ylim(len(self.arms) - 0.5, -0.5)

    def cache(self, figure: Any) -> None:
        """Which attention for which cache: final loss with its interval against bytes a token, a
        panel a size and budget, with one x axis. Arms of one cache stand side by side."""
        axes = figure.subplots(len(self.places), 1, sharex=True, squeeze=False)[:, 0]
        shares = set[float]()
        for ax, (place, here) in zip(axes, self.places.items()):
            near, far = _near(here)
            rows, means, ends = [self.base[place], *near], list[float](), list[float]()
            share = {row.cell.arm: _bytes(row) / _bytes(self.base[place]) for row in rows}
            shares |= set(share.values())
            for row in rows:
                column = [r.cell.arm for r in rows if share[r.cell.arm] == share[row.cell.arm]]
                apart = column.index(row.cell.arm) - (len(column) - 1) / 2
                x, y, d = share[row.cell.arm] * 1.06**apart, row.loss, row.difference
                assert y is not None
                means.append(y)
                if d is not None and d.count > 1:
                    ends += [y + d.low - d.mean, y + d.high - d.mean]
                    ax.plot([x, x], ends[-2:], color=self.colors[row.cell.arm], lw=1.5)
                self._point(ax, row, x, y, _label(row))
            for row in far:
                label = f"{_label(row)}: {_mean(row):+.0f} %"
                self._point(ax, row, math.nan, math.nan, label)
            ax.axhline(means[0], color="black", lw=0.8, ls="--")
            reach = max(means) - min(means) + 0.02
            low = max(min([*means, *ends]), min(means) - reach) - 0.1 * reach
            high = min(max([*means, *ends]), max(means) + reach) + 0.1 * reach
            ax.set(xscale="log", ylim=(low, high))
            ax.set(ylabel="held-out loss (nats)", title=_title(place))
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            _legend(ax, 7)
        labels = [f"1/{1 / s:g}" if s < 1 else f"{s:g}" for s in sorted(shares)]
        axes[-1].set_xticks(sorted(shares), labels)
        axes[-1].set_xticks([], minor=True)
        axes[-1].set_xlabel(f"cache, as a share of {self.study.baseline}'s")

    def chosen(self, rows: Sequence[Row]) -> list[Row]:
        """At most MOST_CURVES rows: the arms of the primary comparison, then the nearest to the
        baseline, best first."""
        near = sorted(_near(rows)[0], key=lambda row: abs(_mean(row)))
        arms, rival = self.study.primary or ((), "")
        near.sort(key=lambda row: row.cell.arm not in (*arms, rival))
        return sorted(near[:MOST_CURVES], key=_mean, reverse=True)

    def gap(self, rows: Sequence[Row], place: Place, figure: Any) -> None:
        """Whether the difference from the baseline shrinks or grows during training."""
        ax = figure.subplots()
        self._style(ax, "y")
        for row in rows:
            points = [(tokens / 1e6, _percent(mean)) for tokens, mean in row.gap]
            look = {"ls": "-" if row.finished else "--", "color": self.colors[row.cell.arm]}
            ax.plot(*zip(*points), lw=1.6, label=_label(row), **look)
        last = max(row.gap[-1][0] for row in rows)
        late = [_percent(m) for row in rows for tokens, m in row.gap if tokens >= 0.2 * last]
        low, high = min([0, *late]), max([0, *late])
        pad = 0.1 * (high - low) + 0.1
        ax.set(xlim=(0, last / 1e6), ylim=(low - pad, high + pad), xlabel="tokens (millions)")
        ax.set(ylabel=self._axis_label, title=_title(place))
        _legend(ax, 8)

    @property
    def _axis_label(self) -> str:
        return f"perplexity above {self.study.baseline} (%)"

    def _limits(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Axis limits in percent that show all means, and as much of the intervals as is near."""
        means = [0.0, 100 * self.study.margin, *map(_mean, rows)]
        reach = 2 * (max(means) - min(means)) + 2
        ends = [r.difference for r in rows if r.difference is not None and r.difference.count > 1]
        low = [max(_percent(d.low), min(means) - reach) for d in ends]
        high = [min(_percent(d.high), max(means) + reach) for d in ends]
        return min([*means, *low]) - 0.1 * reach, max([*means, *high]) + 0.1 * reach

    def _style(self, ax: Any, axis: str) -> None:
        """Mark the baseline and the margin on the axis of the differences."""
        line, span = (ax.axvline, ax.axvspan) if axis == "x" else (ax.axhline, ax.axhspan)
        line(0, color="black", lw=1)
        span(0, _percent(self.study.margin), color="0.92", zorder=0)
        ax.grid(alpha=0.25, axis=axis)
        ax.spines[["top", "right"]].set_visible(False)

    def _point(self, ax: Any, row: Row, x: float, y: float, label: str | None = None) -> None:
        """A mean: filled, or hollow for a row that is not finished."""
        color = self.colors[row.cell.arm]
        fill = color if row.finished else "white"
        ax.plot(x, y, "o", ms=6, color=color, mfc=fill, zorder=3, label=label)
