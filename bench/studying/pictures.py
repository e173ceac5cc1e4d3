"""A study in pictures, one question a picture."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import save_figure
from bench.labels import label_ends, style
from bench.studying.plan import Study
from bench.studying.summary import Row
from mlx_mla.model.weights import num_parameters
from mlx_mla.pictures import pyplot

Names = dict[str, str]
"""Captions to file names."""

LABEL_INCHES, LABEL_POINTS = 1.4, 7

FAR, NEAR_PERCENT = 4, 2
"""An arm is far if its difference is more than so many times the next smaller one, differences
within so many percent being alike."""


def draw(study: Study, rows: Sequence[Row], out: Path) -> Names:
    """Draw what the rows allow into a folder; returns captions with their files, in order."""
    pictures: Names = {}
    finished = _by_place([row for row in rows if row.loss is not None])
    # One arm alone compares nothing.
    places = {place: here for place, here in finished.items() if len(here) > 1}
    shown = [row for here in places.values() for row in here]
    styles = _styles(study)
    paired = [row for row in shown if row.difference is not None]
    if paired:
        pictures["Difference from the baseline"] = _forest(study, paired, styles, out)
    if shown:
        pictures["Loss against cache"] = _cache(study, shown, styles, out)
    for (size, tokens), here in places.items():
        where = _title(size, tokens)
        end = f"{size}-{tokens}.png"
        if max(len(r.curve) for r in here) > 1:
            pictures[f"Loss against tokens, {where}"] = _loss(study, here, styles, where, out, end)
        apart = [r for r in here if len(r.gap) > 1]
        if apart:
            caption = f"Difference against tokens, {where}"
            pictures[caption] = _gap(study, apart, styles, where, out, end)
    if len({r.cell.size for r in paired}) > 1:
        pictures["Difference against size"] = _sizes(study, paired, styles, out)
    return pictures


def _by_place(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows by size and budget, in order."""
    places: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        places.setdefault((row.cell.size, row.cell.tokens), []).append(row)
    return places


def _styles(study: Study) -> dict[str, dict[str, Any]]:
    names = [study.baseline, *(arm for arm in study.arms if arm != study.baseline)]
    return {name: style(i) for i, name in enumerate(names)}


def _axes() -> tuple[Any, Any]:
    """A figure whose axes leave room for labels on their right."""
    width = 6.5
    fig, ax = pyplot().subplots(figsize=(width, 4.2))
    fig.subplots_adjust(left=0.75 / width, right=1 - LABEL_INCHES / width, top=0.9, bottom=0.13)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def _save(fig: Any, out: Path, name: str) -> str:
    save_figure(fig, out / name)
    return name


def _percent(nats: float) -> float:
    """A difference of losses as a share of perplexity, in percent."""
    return 100 * math.expm1(nats)


def far_arms(differences: Mapping[str, float]) -> set[str]:
    """Arms so far from the baseline that an axis with them would show all others as one.

    Args:
        differences: Mean difference from the baseline in percent, an arm without the baseline.
    """
    order = sorted(differences, key=lambda arm: abs(differences[arm]))
    reach = float(NEAR_PERCENT)
    for i, arm in enumerate(order):
        if i and abs(differences[arm]) > FAR * reach:
            return set(order[i:])
        reach = max(reach, abs(differences[arm]))
    return set()


def _near(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a size and budget, and those among them that are far from the baseline."""
    far = far_arms({r.cell.arm: _percent(r.difference.mean) for r in rows if r.difference})
    return [r for r in rows if r.cell.arm not in far], [r for r in rows if r.cell.arm in far]


def _forest(study: Study, rows: list[Row], styles: dict[str, Any], out: Path) -> str:
    """Intervals of the final differences, arms from top to bottom, a panel a size and budget."""
    places = _by_place(rows)
    arms = [arm for arm in study.arms if any(r.cell.arm == arm for r in rows)]
    fig, axes = pyplot().subplots(
        1, len(places), figsize=(2 + 3.6 * len(places), 1.2 + 0.32 * len(arms)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, (place, here) in zip(axes[0], places.items()):
        ax.axvline(0, color="black", lw=1)
        ax.axvspan(0, _percent(study.margin), color="0.9", zorder=0)
        near, far = _near(here)
        ax.set(xlim=_limits(study, near), title=_title(*place))
        for row in far:
            assert row.difference is not None
            percent = _percent(row.difference.mean)
            x, side = (0.98, "right") if percent > 0 else (0.02, "left")
            ax.text(
                x, arms.index(row.cell.arm), f"{percent:+.0f}% {'→' if percent > 0 else '←'}",
                color=styles[row.cell.arm]["color"], ha=side, va="center",
                transform=ax.get_yaxis_transform(),
            )  # fmt: skip
        for row in near:
            d, y = row.difference, arms.index(row.cell.arm)
            assert d is not None
            color = styles[row.cell.arm]["color"]
            if d.count > 1:
                ax.plot([_percent(d.low), _percent(d.high)], [y, y], color=color, lw=2)
            ax.plot(_percent(d.mean), y, "o", color=color, ms=5)
        ax.set_xlabel("perplexity above the baseline's (%)")
        ax.grid(alpha=0.25, axis="x")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(arms)), arms)
    axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
    return _save(fig, out, "difference.png")


def _limits(study: Study, rows: list[Row]) -> tuple[float, float]:
    """Axis limits in percent that show all means, and of the intervals what is not far off."""
    seen = [r.difference for r in rows if r.difference is not None]
    means = [0.0, 100 * study.margin, *(_percent(d.mean) for d in seen)]
    far = 2 * (max(means) - min(means)) + 2
    low = [max(_percent(d.low), min(means) - far) for d in seen if d.count > 1]
    high = [min(_percent(d.high), max(means) + far) for d in seen if d.count > 1]
    return min([*means, *low]) - 0.1 * far, max([*means, *high]) + 0.1 * far


def _title(size: str, tokens: int) -> str:
    return f"{size}, {tokens / 1e6:.3g} M tokens"


def _cache(study: Study, rows: list[Row], styles: dict[str, Any], out: Path) -> str:
    """Which attention for which cache: final loss against bytes a token. Arms stand at the
    baseline's mean loss and their paired difference from it, so that seeds which only some of them
    have move none."""
    places = _by_place(rows)
    width = max(map(_panel_inches, places.values()))
    fig, axes = pyplot().subplots(
        len(places), 1, figsize=(width, 3.6 * len(places)), squeeze=False, layout="constrained"
    )
    for ax, (place, here) in zip(axes[:, 0], places.items()):
        heights = _paired_losses(study, here)
        near, _ = _near(here)
        for row in near:
            color = styles[row.cell.arm]["color"]
            ax.plot(row.cache_bytes, heights[row.cell.arm], "o", color=color, ms=5)
        columns = _columns([r.cache_bytes for r in here])
        shown = [heights[r.cell.arm] for r in near]
        pad = 0.15 * (max(shown) - min(shown)) + 1e-3
        ax.set(
            xscale="log",
            xlim=_cache_limits(columns),
            ylim=(min(shown) - pad, max(shown) + pad),
            xlabel="cache (bytes a token, 16 bits)",
            ylabel="held-out loss (nats a token)",
            title=_title(*place),
        )
        ticks = [column[-1] for column in columns]
        ax.set_xticks(ticks, [f"{b:,}" for b in ticks])
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    fig.canvas.draw()  # labels are placed where the layout has put the axes
    for ax, here in zip(axes[:, 0], places.values()):
        to_axes = ax.transData + ax.transAxes.inverted()
        heights = _paired_losses(study, here)
        for column in _columns([r.cache_bytes for r in here]):
            names = [
                _label(ax, r, r.cache_bytes, heights[r.cell.arm], styles)
                for r in here
                if r.cache_bytes in column
            ]
            at = to_axes.transform((column[-1], names[0][1]))[0]
            label_ends(ax, names, at=at, size=LABEL_POINTS)
    return _save(fig, out, "loss-cache.png")


def _paired_losses(study: Study, rows: Sequence[Row]) -> dict[str, float]:
    """Mean losses of arms at one size and budget, by their paired differences where there are
    any."""
    means = {r.cell.arm: r.loss.mean for r in rows if r.loss is not None}
    base = means.get(study.baseline)
    if base is None:
        return means
    return means | {r.cell.arm: base + r.difference.mean for r in rows if r.difference is not None}


def _paired_curves(study: Study, rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """The same at all tokens: (tokens, mean loss) of every arm."""
    curves = {r.cell.arm: {p.tokens: p.value.mean for p in r.curve} for r in rows}
    base = curves.get(study.baseline, {})
    for row in rows:
        paired = {p.tokens: base[p.tokens] + p.value.mean for p in row.gap if p.tokens in base}
        curves[row.cell.arm] = paired or curves[row.cell.arm]
    return {arm: list(curve.items()) for arm, curve in curves.items()}


def _cache_limits(columns: Sequence[Sequence[int]]) -> tuple[float, float]:
    low, high = columns[0][0], columns[-1][-1]
    span = max(high / low, 2)
    return low / span**0.08, high * span**0.35


def _panel_inches(rows: Sequence[Row]) -> float:
    """Width of a panel where no column's names reach the next column."""
    columns = _columns([r.cache_bytes for r in rows])
    low, high = map(math.log, _cache_limits(columns))
    needed = 4.8
    for column, following in itertools.pairwise(columns):
        share = math.log(following[0] / column[-1]) / (high - low)
        longest = max(len(r.cell.arm) for r in rows if r.cache_bytes in column)
        # A letter is 0.6 of its size wide, and the axes are an inch narrower than their panel.
        needed = max(needed, 1 + (0.6 * LABEL_POINTS / 72 * longest + 0.25) / share)
    return needed


def _columns(widths: Sequence[int]) -> list[list[int]]:
    """Cache widths in groups of those that are within a tenth of each other."""
    columns: list[list[int]] = []
    for width in sorted(set(widths)):
        if columns and width < 1.1 * columns[-1][-1]:
            columns[-1].append(width)
        else:
            columns.append([width])
    return columns


def _loss(
    study: Study, rows: list[Row], styles: dict[str, Any], where: str, out: Path, end: str
) -> str:
    """Loss against tokens, paired as in `_cache`."""
    fig, ax = _axes()
    curves = _paired_curves(study, rows)
    for arm, points in curves.items():
        ax.plot(*zip(*((tokens / 1e6, loss) for tokens, loss in points)), lw=1.4, **styles[arm])
    near, _ = _near(rows)
    values = sorted(loss for r in near for _, loss in curves[r.cell.arm])
    # The first points are far above; the end is what the question is about.
    top = values[int(0.85 * (len(values) - 1))]
    ax.set_ylim(values[0] - 0.05 * (top - values[0]), top)
    ax.set_xlim(0, max(tokens for points in curves.values() for tokens, _ in points) / 1e6)
    ax.set(
        xlabel="tokens (millions)", ylabel="held-out loss (nats a token), mean over seeds",
        title=where,
    )  # fmt: skip
    ends = [(row, *curves[row.cell.arm][-1]) for row in rows]
    label_ends(ax, [_label(ax, row, n / 1e6, loss, styles) for row, n, loss in ends])
    return _save(fig, out, f"loss-tokens-{end}")


def _gap(
    study: Study, rows: list[Row], styles: dict[str, Any], where: str, out: Path, end: str
) -> str:
    """Whether the difference closes or opens."""
    fig, ax = _axes()
    ax.axhspan(0, _percent(study.margin), color="0.93", zorder=0)
    ax.axhline(0, color="black", lw=1)
    for row in rows:
        points = [(p.tokens / 1e6, _percent(p.value.mean)) for p in row.gap]
        ax.plot(*zip(*points), lw=1.4, **styles[row.cell.arm])
    last = max(p.tokens for r in rows for p in r.gap)
    near, _ = _near(rows)
    late = [_percent(p.value.mean) for r in near for p in r.gap if p.tokens >= 0.2 * last]
    pad = 0.1 * (max([0, *late]) - min([0, *late])) + 0.1
    ax.set_ylim(min([0, *late]) - pad, max([0, *late]) + pad)
    ax.set_xlim(0, last / 1e6)
    ax.set(
        xlabel="tokens (millions)", ylabel=f"perplexity above {study.baseline}'s (%)", title=where
    )
    ends = [(row, row.gap[-1].tokens, _percent(row.gap[-1].value.mean)) for row in rows]
    label_ends(ax, [_label(ax, row, n / 1e6, gap, styles, percent=True) for row, n, gap in ends])
    return _save(fig, out, f"difference-tokens-{end}")


def _label(
    ax: Any, row: Row, x: float, y: float, styles: dict[str, Any], percent: bool = False
) -> tuple[float, float, str, str]:
    """An arm's name where its line ends; off the axes at their edge, with its value."""
    name, color = row.cell.arm, styles[row.cell.arm]["color"]
    said = f"{y:+.0f}%" if percent else f"{y:.2f}"
    low, high = ax.get_ylim()
    if low <= y <= high:
        return x, y, name, color
    return (x, high, f"{name} {said} ↑", color) if y > high else (x, low, f"{name} {said} ↓", color)


def _sizes(study: Study, rows: list[Row], styles: dict[str, Any], out: Path) -> str:
    """Difference against size, of the arms that ran at several, at the largest budget of a size
    that all of them have."""
    count = Counter(arm for arm, _ in {(r.cell.arm, r.cell.size) for r in rows})
    several = [r for r in rows if count[r.cell.arm] > 1]
    shown, near = [], []
    for size in study.sizes:
        here = [r for r in several if r.cell.size == size]
        budgets = [{r.cell.tokens for r in here if r.cell.arm == arm} for arm in count]
        shared = set.intersection(*(b for b in budgets if b)) if here else set()
        here = [r for r in here if r.cell.tokens == max(shared, default=None)]
        shown += here
        near += _near(here)[0]
    fig, ax = _axes()
    ax.axhspan(0, _percent(study.margin), color="0.93", zorder=0)
    ax.axhline(0, color="black", lw=1)
    ax.set_ylim(_limits(study, near))
    ends = []
    for arm in study.arms:
        own = sorted((r for r in shown if r.cell.arm == arm), key=lambda r: r.parameters)
        points = [(r.parameters / 1e6, r.difference) for r in own if r.difference is not None]
        if not points:
            continue
        means = [_percent(d.mean) for _, d in points]
        ax.plot([n for n, _ in points], means, marker="o", ms=4, **styles[arm])
        for n, d in points:
            if d.count > 1:
                ax.plot([n, n], [_percent(d.low), _percent(d.high)], color=styles[arm]["color"])
        ends.append(_label(ax, own[-1], points[-1][0], means[-1], styles, percent=True))
    ax.set(
        xscale="log", xlabel="size (at the baseline's parameters)",
        ylabel=f"perplexity above {study.baseline}'s (%)",
    )  # fmt: skip
    sizes = {
        c.size: num_parameters(c.config.model) / 1e6 for c in study.cells if c.arm == study.baseline
    }
    low, high = ax.get_xlim()  # of the arms, which may all be smaller than the baseline
    ax.set_xlim(min(low, *sizes.values()) / 1.03, max(high, *sizes.values()) * 1.03)
    ax.set_xticks(list(sizes.values()), list(sizes))
    ax.set_xticks([], minor=True)
    label_ends(ax, ends)
    return _save(fig, out, "difference-size.png")
