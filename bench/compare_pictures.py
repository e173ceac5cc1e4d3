"""Pictures of compare_backends' and decode's results, one for each question.

Speed is shown as its ratio to this project's GPT-2 (multi-head attention) in the same backend, so
that the axis is about the difference.
"""

from collections.abc import Sequence
from typing import Any

from bench.harness import Document, Row
from bench.labels import label_ends, style
from mlx_mla.pictures import pyplot

WITHOUT_CACHE = "none"


def base_of(rows: Sequence[Row], row: Row, baseline: str | None) -> Row | None:
    """The row of the model that ratios are against, under the same conditions."""
    for r in rows:
        same = all(r[k] == row[k] for k in ("measure", "backend", "batch", "context"))
        if same and r["status"] == "ok" and r["model"] == baseline:
            return r
    return None


def figures(document: Document) -> dict[str, Any]:
    """What the rows allow: each measure's speed, and the cache's memory."""
    rows = [r for r in document["rows"] if r["status"] == "ok"]
    baseline = document.get("baseline")
    drawn = decoding_figures(document, "decoding")
    for measure in ("forward", "first token", "training"):
        own = [r for r in rows if r["measure"] == measure]
        panels = {
            b: _lines([r for r in own if r["backend"] == b], baseline) for b in _backends(own)
        }
        if any(panels.values()):
            drawn[measure.split()[0]] = _ratios(panels, f"{measure}: speed", baseline)
    if widths := [r for r in rows if r["measure"] == "decoding" and r["cache_bytes_per_token"]]:
        drawn["cache"] = _cache(widths)
    return drawn


def decoding_figures(document: Document, name: str) -> dict[str, Any]:
    """How many times the baseline's speed each cache decodes at, by context: `NAME-BACKEND`, a
    panel a batch."""
    drawn = {}
    baseline = document.get("baseline")
    decoded = [
        r
        for r in document["rows"]
        if r["measure"] == "decoding" and r["status"] == "ok" and r["cache"] != WITHOUT_CACHE
    ]
    for backend in _backends(decoded):
        own = [r for r in decoded if r["backend"] == backend]
        panels = {
            f"batch {batch}": _lines([r for r in own if r["batch"] == batch], baseline)
            for batch in sorted({r["batch"] for r in own})
        }
        if any(panels.values()):
            drawn[f"{name}-{backend}"] = _ratios(panels, f"{backend}: decoding speed", baseline)
    return drawn


Place = tuple[int, int]
"""Context and batch of a row."""
Lines = dict[str, list[tuple[Place, float]]]
"""Ratios by name."""


def _backends(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(r["backend"] for r in rows))


def _lines(rows: Sequence[Row], baseline: str | None) -> Lines:
    """Ratios to the baseline's speed, by model and, where a model has several, cache."""
    with_latents = {r["model"] for r in rows if r["cache"] == "latent"}
    lines: Lines = {}
    for r in rows:
        base = base_of(rows, r, baseline)
        if base is None or base is r or r["cache"] == WITHOUT_CACHE:
            continue
        name = f"{r['model']}, {r['cache']}" if r["model"] in with_latents else r["model"]
        ratio = r["tokens_per_sec"]["median"] / base["tokens_per_sec"]["median"]
        lines.setdefault(name, []).append(((r["context"], r["batch"]), ratio))
    return {name: sorted(points) for name, points in lines.items()}


def _ratios(panels: dict[str, Lines], title: str, baseline: str | None) -> Any:
    """Ratios against context, a panel each; where a panel has one place, the panels are the x
    axis of one."""
    panels = {name: lines for name, lines in panels.items() if lines}
    places = sorted({p for lines in panels.values() for line in lines.values() for p, _ in line})
    names = list(dict.fromkeys(n for lines in panels.values() for n in lines))
    styles = {name: style(i + 1) for i, name in enumerate(names)}
    several = any(len(line) > 1 for lines in panels.values() for line in lines.values())
    if several:
        by_context = len({context for context, _ in places}) == len(places) or len(panels) > 2
        shown = panels
    else:
        shown = {"": {n: [] for n in names}}
        for i, lines in enumerate(panels.values()):
            for name, line in lines.items():
                shown[""][name].append(((i, 0), line[0][1]))
        by_context = False
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    width, height = 5.6 * columns, 3.1 * rows + 0.3
    fig, axes = pyplot().subplots(rows, columns, figsize=(width, height), squeeze=False)
    # Each panel has room for its labels at its right.
    fig.subplots_adjust(
        left=0.6 / width, right=1 - 1.9 / width, wspace=0.8,
        bottom=0.5 / height, top=1 - 0.55 / height, hspace=0.45,
    )  # fmt: skip
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, (name, lines) in zip(axes.flat, shown.items()):
        own = sorted({p for x in lines.values() for p, _ in x})
        if by_context:
            x_of = {place: float(place[0]) for place in own}
            label = "context (tokens)"
            if len(own) > 1:
                ax.set_xscale("log")
        else:
            x_of = {place: float(i) for i, place in enumerate(own)}
            ticks = [f"{b} x {c:,}" for c, b in own] if several else list(panels)
            label = "batch x tokens" if several else ""
        xs = sorted(set(x_of.values()))
        ax.set_xticks(xs, [f"{x:,.0f}" for x in xs] if by_context else ticks, fontsize=8)
        ax.set_xticks([], minor=True)
        _limits(ax, xs, [ratio for line in lines.values() for _, ratio in line])
        ax.axhline(1, color="black", lw=1)
        ends = [(xs[-1], 1.0, str(baseline), "black")]
        for model, line in lines.items():
            points = [(x_of[place], ratio) for place, ratio in line]
            look = {**styles[model], "lw": 1.4}
            if not by_context:  # between places there is nothing
                look |= {"lw": 0.7, "linestyle": ":"}
            ax.plot(*zip(*points), marker="o", ms=3.5, **look)
            ends.append((*points[-1], model, styles[model]["color"]))
        ax.set_title(name, fontsize=9)
        ax.set_xlabel(label, fontsize=9)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        label_ends(ax, ends, size=7.5)
    fig.suptitle(f"{title}, times {baseline}'s", fontsize=10)
    return fig


def _limits(ax: Any, xs: Sequence[float], ratios: Sequence[float]) -> None:
    """Axes that end where the points do; logarithmic ratios where they span much."""
    if ax.get_xscale() == "log":
        margin = (xs[-1] / xs[0]) ** 0.05
        ax.set_xlim(xs[0] / margin, xs[-1] * margin)
    else:
        margin = 0.08 * (xs[-1] - xs[0]) or 0.5
        ax.set_xlim(xs[0] - margin, xs[-1] + margin)
    low, high = min([1.0, *ratios]), max([1.0, *ratios])
    if high > 2 * low:
        ax.set_yscale("log")
        marks = [0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]
        ax.set_yticks(marks, [f"{m:g}x" for m in marks], fontsize=8)
        ax.set_yticks([], minor=True)
        margin = (high / low) ** 0.06
        ax.set_ylim(low / margin, high * margin)
    else:
        ax.yaxis.set_major_formatter(lambda x, _: f"{round(x, 3):g}x")
        ax.tick_params(axis="y", labelsize=8)
        margin = 0.08 * (high - low) or 0.02
        ax.set_ylim(low - margin, high + margin)


def _cache(rows: Sequence[Row]) -> Any:
    """Memory of one sequence's cache against context, a line a width."""
    names: dict[int, list[str]] = {}
    for r in rows:
        own = names.setdefault(r["cache_bytes_per_token"], [])
        if r["cache"] == "latent" and r["model"] not in own:
            own.append(r["model"])
    end = max(r["context"] for r in rows)
    fig, ax = pyplot().subplots(figsize=(7, 3.6))
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
    label_ends(ax, ends, size=8)
    return fig
