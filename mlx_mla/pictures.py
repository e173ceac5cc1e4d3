"""How pictures are drawn: one style for all, whatever the user's matplotlib settings are."""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError
from mlx_mla.files import atomic_file

LONGEST_NAME = 60


def draw(
    out: Path, paint: Callable[[Any], object], *, optional: bool = False, **figure: Any
) -> None:
    """Draw a picture into a file, replacing it in one step.

    The figure has a canvas of its own and matplotlib's default settings. It depends on no display,
    notebook or matplotlibrc, and leaves a notebook's own plots alone.

    Args:
        out: The file; its suffix decides the format (.png, .svg, .pdf).
        paint: Puts axes and artists onto the `matplotlib.figure.Figure` that it is given.
        optional: The picture only accompanies other work: whatever goes wrong becomes one warning
            on stderr.
        figure: Arguments of the figure, for example `figsize=(7, 4)` in inches.

    Raises:
        UserError: If the file cannot be written, unless `optional`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a font may lack characters of some names
            _draw(out, paint, figure)
    except Exception as e:
        if not optional:
            raise
        reason = e if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        text = f"warning: {out}: no picture drawn: {reason}"
        print(" ".join(text.split()), file=sys.stderr)


def _draw(out: Path, paint: Callable[[Any], object], figure: dict[str, Any]) -> None:
    matplotlib = _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = dict(matplotlib.rcParamsDefault)
    with matplotlib.rc_context({k: v for k, v in settings.items() if not k.startswith("backend")}):
        fig = Figure(**figure)
        FigureCanvasAgg(fig)
        paint(fig)
        with atomic_file(out) as file:
            fig.savefig(file, dpi=120, format=out.suffix[1:].lower())


def _matplotlib() -> Any:
    """matplotlib, imported whatever MPLBACKEND names: a notebook's children inherit a backend that
    they may lack."""
    if "matplotlib" not in sys.modules:
        backend = os.environ.pop("MPLBACKEND", None)
        import matplotlib

        if backend is not None:
            os.environ["MPLBACKEND"] = backend
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    return sys.modules["matplotlib"]


def plain(name: str, longest: int = LONGEST_NAME) -> str:
    """A name for matplotlib to show literally: dollar signs escaped, and shortened to its end."""
    line = "".join(c if c.isprintable() else "?" for c in name)
    if len(line) > longest:
        line = f"...{line[3 - longest :]}"  # the end of a path identifies it best
    return line.replace("$", r"\$")


def alone(points: Sequence[Any]) -> dict[str, Any]:
    """What makes a curve of a single point visible, as of a run that has only begun."""
    return {"marker": "o", "ms": 4} if len(points) == 1 else {}


def loss_axis(ax: Any) -> None:
    """Scale the y axis for losses: logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    shown = [y for line in ax.lines for y in line.get_ydata() if y > 0 and math.isfinite(y)]
    ax.set_yscale("log")
    # Losses rarely span a decade, so plain numbers read better than powers of ten.
    is_wide = bool(shown) and max(shown) > 8 * min(shown)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(8))
    ax.yaxis.set_major_formatter("{x:.5g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    if shown:
        ax.set_ylim(bottom=0.97 * min(shown))
