"""What pictures share, and the picture of a run's loss."""

import warnings
from pathlib import Path
from typing import Any

from mlx_mla.files import atomic_file

LONGEST_NAME = 60


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; imported here, since that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plain(name: str) -> str:
    """A name as matplotlib shows it: dollars are no formula, and one line is not too long."""
    line = "".join(c if c.isprintable() else "?" for c in name)
    if len(line) > LONGEST_NAME:
        line = f"...{line[3 - LONGEST_NAME :]}"  # the end of a path tells most
    return line.replace("$", r"\$")


def save(fig: Any, out: Path) -> None:
    """Replace a picture in one step; UserError if it cannot be written."""
    import matplotlib.pyplot as plt

    try:
        with atomic_file(out) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fonts lack characters of some names
            fig.savefig(file, dpi=120, format=out.suffix[1:].lower())
    finally:
        plt.close(fig)


def loss_axis(ax: Any) -> None:
    """Logarithmic losses with plain numbers; logarithmic x, too, where it spans two decades."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    xs = [x for line in ax.lines for x in line.get_xdata() if x > 0]
    if xs and max(xs) >= 100 * min(xs):
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.set_yscale("log")
    # Losses rarely span a decade, so plain numbers read better than powers of ten.
    ax.yaxis.set_major_locator(MaxNLocator(8))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
