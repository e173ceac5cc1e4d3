"""Pictures of compare_backends' results, one for each question.

Speed is shown as its ratio to this project's GPT-2 (multi-head attention) in the same backend, so
that differences are visible; without such a baseline, in tokens per second.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from bench.harness import Document, Picture
from bench.rows import Row

LOWEST = -0.13
"""The lowest label, as a share of the axes' height above them."""
Lines = dict[str, list[tuple[tuple[int, int], float]]]
"""By name, ((context, batch), ratio or speed) of each point."""


def base_of(rows: Sequence[Row], row: Row, baseline: str | None) -> Row | None:
    """The row of the model that ratios are against, under the same conditions."""

    def conditions(r: Row) -> tuple[Any, ...]:
        return r.measure, r.backend, r.batch, r.context

    own = (r for r in rows if r.model == baseline and r.speed and conditions(r) == conditions(row))
    return next(own, None)


def figures(found: Document) -> dict[str, Picture]:
    """Every picture that the rows have data for: speed by measure, and memory of the cache."""
    rows: list[Row] = [r for r in found["rows"] if r.speed]
    baseline = found.get("baseline")
    drawn: dict[str, Picture | None] = {}
    for measure in ("forward", "first token", "training"):
        panels = {
            backend: _lines(
                [r for r in rows if (r.measure, r.backend) == (measure, backend)], baseline
            )
            for backend in ("mlx", "torch")
        }
        drawn[measure.split()[0]] = _speeds(panels, f"{measure}: speed", baseline)
    for backend in ("mlx", "torch"):
        own = [r for r in rows if (r.measure, r.backend) == ("decoding", backend)]
        if baseline:
            batches = sorted({r.batch for r in own if r.cache != "none"})
            groups = {f"batch {b}": [r for r in own if r.batch == b] for b in batches}
        else:
            models = dict.fromkeys(r.model for r in own if r.cache != "none")
            groups = {model: [r for r in own if r.way[0] == model] for model in models}
        panels = {name: _lines(group, baseline) for name, group in groups.items()}
        drawn[f"decoding-{backend}"] = _speeds(panels, f"{backend}: decoding speed", baseline)
    if widths := [r for r in rows if r.measure == "decoding" and r.cache_bytes_per_token]:
        drawn["cache"] = _cache(widths)
    return {name: picture for name, picture in drawn.items() if picture}


def _lines(rows: Sequence[Row], baseline: str | None) -> Lines:
    """Ratios to the baseline's speed, by model and, where a model has several, cache; without a
    baseline speeds by cache."""
    with_latents = {r.model for r in rows if r.cache == "latent"}
    lines: Lines = {}
    for r in rows:
        base = base_of(rows, r, baseline)
        if baseline and (base is None or base is r or r.cache == "none"):
            continue
        name = f"{r.model}, {r.cache}" if r.model in with_latents else r.model
        name, value = (name, r.speed / base.speed) if base else (r.way[1], r.speed)
        lines.setdefault(name, []).append(((r.context, r.batch), value))
    return {name: sorted(points) for name, points in lines.items()}


def _speeds(panels: Mapping[str, Lines], title: str, baseline: str | None) -> Picture | None:
    """A panel for each entry that has lines, against batch and context."""
    panels = {name: lines for name, lines in panels.items() if lines}
    longest = max((len(x) for lines in panels.values() for x in lines.values()), default=0)
    if longest < (1 if baseline else 2):
        return None
    names = list(dict.fromkeys(n for lines in panels.values() for n in lines))
    styles = {name: style(i + bool(baseline)) for i, name in enumerate(names)}
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 5.6 * columns, 3.1 * rows + 0.3

    def paint(fig: Any) -> None:
        axes = list(fig.subplots(rows, columns, squeeze=False).flat)
        # Each panel has room for its labels at its right.
        fig.subplots_adjust(
            left=0.6 / width, right=1 - 1.9 / width, wspace=0.8,
            bottom=0.5 / height, top=1 - 0.55 / height, hspace=0.45,
        )  # fmt: skip
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax, (panel, lines) in zip(axes, panels.items()):
            places = sorted({place for line in lines.values() for place, _ in line})
            several = len({batch for _, batch in places}) > 1
            ticks = [f"{b} x {c:,}" if several else f"{c:,}" for c, b in places]
            ax.set_xticks(range(len(places)), ticks, fontsize=8)
            ax.set_xlim(-0.3, len(places) - 0.7)
            _limit(ax, [v for line in lines.values() for _, v in line], bool(baseline))
            ends = []
            if baseline:
                ax.axhline(1, color="black", lw=1)
                ends.append((len(places) - 1.0, 1.0, baseline, "black"))
            for label, line in lines.items():
                xs, ys = [places.index(place) for place, _ in line], [value for _, value in line]
                ax.plot(xs, ys, marker="o", ms=3.5, lw=1.2, **styles[label])
                ends.append((float(xs[-1]), ys[-1], label, styles[label]["color"]))
            ax.set_title(panel, fontsize=9)
            ax.set_xlabel("batch x tokens" if several else "tokens", fontsize=9)
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            label_ends(ax, ends, 7.5)
        unit = f"times that of {baseline}" if baseline else "tok/s"
        fig.suptitle(f"{title}, {unit}", fontsize=10)

    return Picture(paint, (width, height))


def _limit(ax: Any, values: Sequence[float], ratios: bool) -> None:
    """A value axis that ends where the points do; logarithmic where they span much."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min([*values, *[1.0] * ratios]), max([*values, *[1.0] * ratios])
    if high > 2 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        ax.yaxis.set_minor_locator(NullLocator())
        margin = (high / low) ** 0.06
        ax.set_ylim(low / margin, high * margin)
    else:
        margin = 0.08 * (high - low) or 0.02 * high
        ax.set_ylim(low - margin, high + margin)
    ax.yaxis.set_major_formatter(lambda y, _: f"{round(y, 3):g}{'x' * ratios}")
    ax.tick_params(axis="y", labelsize=8)


def _cache(rows: Sequence[Row]) -> Picture:
    """Memory of one sequence's cache against context, a line for each width."""
    names: dict[int, list[str]] = {}
    for r in rows:
        own = names.setdefault(r.cache_bytes_per_token or 0, [])
        if r.cache == "latent" and r.model not in own:
            own.append(r.model)
    end = max(r.context for r in rows)

    def paint(fig: Any) -> None:
        ax = fig.subplots()
        fig.subplots_adjust(left=0.1, right=0.64, bottom=0.14, top=0.95)
        ends = []
        for i, (width, latents) in enumerate(sorted(names.items(), reverse=True)):
            look = style(i)
            ax.plot([0, end], [0, end * width / 1e6], lw=1.6, **look)
            name = ", ".join(latents) or "keys and values"
            ends.append((end, end * width / 1e6, f"{name}: {width:,} B a token", look["color"]))
        ax.set_xlim(0, end)
        ax.set_ylim(0, end * max(names) / 1e6)
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel("cache of one sequence (MB)")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        label_ends(ax, ends, 8)

    return Picture(paint, (7, 3.6))


def style(index: int) -> dict[str, Any]:
    """Colour and line of the index-th line shown; the first, the reference, is black."""
    if index == 0:
        return {"color": "black", "linestyle": "-"}
    lines = ("-", "--", ":")
    return {"color": f"C{(index - 1) % 10}", "linestyle": lines[(index - 1) // 10 % len(lines)]}


def label_ends(ax: Any, ends: Sequence[tuple[float, float, str, str]], size: float) -> None:
    """Label each line at its right end; labels do not overlap.

    Args:
        ax: Axes whose limits are final.
        ends: (x, y, name, color) of each line's end, in data coordinates.
        size: Points of the letters.
    """
    height = ax.get_window_extent().height / ax.figure.dpi * 72
    gap = 1.25 * size / height
    to_axes = ax.transData + ax.transAxes.inverted()
    places = [(*to_axes.transform((x, y)), name, color) for x, y, name, color in ends]
    places.sort(key=lambda place: place[1])
    placed = spread([place[1] for place in places], gap)
    heights = [max(label, LOWEST + i * gap) for i, label in enumerate(placed)]
    for (x, y, name, color), label in zip(places, heights):
        joint = [x, 1.03], [y, label]
        ax.plot(*joint, color=color, lw=0.6, alpha=0.6, transform=ax.transAxes, clip_on=False)
        where = {"va": "center", "transform": ax.transAxes}
        ax.text(1.035, label, name, color=color, fontsize=size, **where)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights moved apart until neighbors are at least `gap` from each other.

    Heights that are too close form a group, which is centred where its members were.
    """
    groups: list[list[float]] = []
    for i, height in enumerate(heights):
        groups.append([height - i * gap])  # of which no group may be below the one before it
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    levels = [fmean(group) for group in groups for _ in group]
    return [level + i * gap for i, level in enumerate(levels)]
