"""A row of the check: what it looks at, what it needs, and what it found."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Need = Literal["metal", "gpu", "torch", "mps", "cuda", "compiler", "checkout"]

NEEDS: dict[Need, str] = {
    "metal": "a Mac's GPU in MLX (Metal)",
    "gpu": "a GPU in MLX (Metal or CUDA)",
    "torch": "PyTorch (pip install torch)",
    "mps": "a Mac's GPU in PyTorch (MPS)",
    "cuda": "an NVIDIA GPU in PyTorch (CUDA)",
    "compiler": "g++, without which MLX compiles no steps on Linux",
    "checkout": "a checkout of the repository, which has bench/",
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a row found."""

    passed: bool
    figure: str
    """What was measured, with the bound that decides."""


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
    run: Callable[[Path], Outcome]
    """Does the check in an empty folder that is removed afterwards; whatever it raises fails the
    row."""
    needs: tuple[Need, ...] = ()
    """Without one of these the row is skipped."""


def at_most(value: float, bound: float, what: str) -> Outcome:
    """Passes where a figure is within its bound; NaN is not."""
    return Outcome(value <= bound, f"{what} {value:.2g} (at most {bound:g})")


def together(outcomes: dict[str, Outcome]) -> Outcome:
    """Several findings as one, which passes where all do; those that failed come first."""
    order = sorted(outcomes.items(), key=lambda item: item[1].passed)
    return Outcome(
        all(o.passed for o in outcomes.values()), "; ".join(f"{k}: {o.figure}" for k, o in order)
    )
