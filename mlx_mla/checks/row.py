"""A row of the check: what it looks at, what it needs, and what it found.

A row is a function with the decorator `row`. Its docstring is what the page for Mac owners says of
it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mlx_mla.model.config import BackendName, DeviceName

Need = Literal["metal", "torch", "torch-gpu", "mps", "compiler", "checkout"]

NEEDS: dict[Need, str] = {
    "metal": "a Mac's GPU in MLX (Metal)",
    "torch": "PyTorch (pip install torch)",
    "torch-gpu": "a GPU in PyTorch (MPS or CUDA)",
    "mps": "a Mac's GPU in PyTorch (MPS)",
    "compiler": "g++, without which MLX compiles no steps on Linux",
    "checkout": "a checkout of the repository, which has bench/",
}

DEVICES: dict[str, tuple[BackendName, DeviceName, tuple[Need, ...], str]] = {
    "mlx": ("mlx", "auto", (), "MLX's default device (a Mac's GPU)"),
    "torch-gpu": ("torch", "auto", ("torch", "torch-gpu"), "PyTorch's GPU"),
    "torch-cpu": ("torch", "cpu", ("torch",), "PyTorch's CPU"),
}
"""Devices that are held against MLX on the CPU: backend, its --device, needs, and words."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a row found, or a part of it."""

    passed: bool
    figure: str
    """What was measured, with the bound that decides."""
    kind: str = ""
    """Of several parts of one kind, the largest is reported. "": always reported."""
    size: float = 0.0


Check = Callable[..., Iterator[Outcome]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One thing to check, run in a process of its own."""

    name: str
    what: str
    """For people, in Markdown."""
    where: tuple[str, ...]
    """Places in the code, each `FILE` or `FILE:SYMBOL`."""
    expected: str
    """What a right result looks like."""
    minutes: float
    """A rough guess, by which the rows are ordered."""
    run: Callable[[Path], Iterator[Outcome]]
    """Does the check in an empty folder that is removed afterwards, and gives each part as soon as
    it is known; whatever it raises fails the row."""
    needs: tuple[Need, ...] = ()
    """Without one of these the row is skipped."""


FOUND: list[Row] = []
"""Every row of the modules that were imported; `rows.ROWS` is the whole list."""


def row(
    where: tuple[str, ...] | Mapping[BackendName, tuple[str, ...]], **fields: Any
) -> Callable[[Check], Check]:
    """Make a function a row of its name.

    Args:
        where: Places in the code. Those of each backend make it one row for each of DEVICES; the
            function is then of (place, backend, device), and its docstring has `{device}`.
        fields: The other fields of `Row`.
    """

    def add(check: Check) -> Check:
        assert check.__doc__
        name = check.__name__.replace("_", "-")
        what = " ".join(check.__doc__.split()).removesuffix(".")
        if isinstance(where, tuple):
            FOUND.append(Row(name=name, what=what, where=where, run=check, **fields))
            return check
        for key, (backend, device, needs, words) in DEVICES.items():
            FOUND.append(
                Row(
                    name=f"{name}-{key}",
                    what=what.format(device=words),
                    where=where[backend],
                    needs=needs,
                    run=functools.partial(check, backend=backend, device=device),
                    **fields,
                )
            )
        return check

    return add


def at_most(value: float, bound: float, what: str, of: str = "") -> Outcome:
    """Passes where a figure is within its bound; NaN is not.

    Args:
        what: The kind of figure, of which only the largest is reported.
        of: What it is the figure of, for example a preset.
    """
    figure = f"{what} {value:.2g} (at most {bound:g}){of and f', {of}'}"
    size = math.inf if math.isnan(value) else float(value)
    return Outcome(bool(value <= bound), figure, what, size)


def together(parts: Iterable[Outcome]) -> Outcome:
    """Parts as one, which passes where all do; those that failed come first."""
    largest: dict[str, Outcome] = {}
    for part in parts:
        key = part.kind or part.figure
        if key not in largest or part.size > largest[key].size:
            largest[key] = part
    order = sorted(largest.values(), key=lambda part: part.passed)
    return Outcome(all(part.passed for part in order), "; ".join(part.figure for part in order))
