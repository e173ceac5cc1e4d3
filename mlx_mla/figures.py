"""Pictures with matplotlib: set up without a display, names shown as they are, files whole or not
at all."""

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from mlx_mla.errors import UserError

LONGEST_NAME = 60


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files; imported late, since that takes a second."""
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


def save(figure: Any, out: Path) -> None:
    """Replace a picture in one step, and close the figure.

    Raises:
        UserError: If the system refuses.
    """
    suffix = out.suffix.lower()
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=suffix, dir=out.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fonts lack characters of some names
                figure.savefig(temporary, dpi=120, format=suffix[1:])
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{out}: could not be written: {e.strerror or e}") from e
    finally:
        pyplot().close(figure)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
