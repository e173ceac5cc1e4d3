"""Direct labels in pictures, in place of legends that cover what they explain."""

from collections.abc import Sequence
from typing import Any

LOWEST = -0.13
"""The lowest label, as a share of the axes' height above them."""


def style(index: int) -> dict[str, Any]:
    """Colour and line of the index-th thing shown; the first, what others are compared with, is
    black."""
    if index == 0:
        return {"color": "black", "linestyle": "-"}
    lines = ("-", "--", ":")
    return {"color": f"C{(index - 1) % 10}", "linestyle": lines[(index - 1) // 10 % len(lines)]}


def label_ends(
    ax: Any, ends: Sequence[tuple[float, float, str, str]], at: float = 1.0, size: float = 8
) -> None:
    """Write names beside the ends of lines, each joined to its own, none on another.

    Args:
        ax: Axes whose limits are final.
        ends: (x, y, name, colour) of each line's end, in data coordinates.
        at: Left of the names, as a share of the axes' width; 1 is the right edge.
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
        joint = [x, at + 0.03], [y, label]
        ax.plot(*joint, color=color, lw=0.6, alpha=0.6, transform=ax.transAxes, clip_on=False)
        where = {"va": "center", "transform": ax.transAxes}
        ax.text(at + 0.035, label, name, color=color, fontsize=size, **where)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights moved apart until neighbours are at least `gap` from each other.

    Heights that are too close form a group, which is centred where its members were.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * gap / 2


def _top(group: list[float], gap: float) -> float:
    return sum(group) / len(group) + (len(group) - 1) * gap / 2
