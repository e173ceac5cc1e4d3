"""What a study has still to run."""

import dataclasses

from bench.studying.plan import Run, Study
from bench.studying.results import Results
from mlx_mla.model.estimate import forward_flops_per_token


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What to run next, and what will follow."""

    ready: list[Run]
    """Runs that wait for nothing, in the order to start them."""
    later: list[Run]
    """Runs that wait for others; their rates and stds are placeholders."""


def agenda(study: Study, results: Results) -> Agenda:
    """What the finished runs leave to do.

    Sizes come in the order of the file; in each, all arms are tuned before any seed, then seed by
    seed all arms, so that whatever has finished can be compared.
    """
    ready: list[Run] = []
    later: list[Run] = []
    for size in study.sizes:
        repeated: list[tuple[int, Run]] = []
        for cell in study.cells:
            if cell.size != size:
                continue
            found = results.tuning(cell, study.extensions)
            ready += found.wanted
            if found.wanted:
                stds = cell.stds if found.std is None and cell.tunes_std else ()
                later += [cell.tuning(cell.rates[0], std) for std in stds]
                if cell.tunes_rate_again and found.rate_again is None:
                    later += [cell.tuning(cell.rates[0])] * 3
                later += [cell.final(cell.rates[0], cell.stds[0], s) for s in cell.seeds]
            repeated += [(i, r) for i, r in enumerate(found.finals) if results.get(r) is None]
        ready += [run for _, run in sorted(repeated, key=lambda pair: pair[0])]
    # Budgets that are tuned with the same tokens share their tuning runs.
    return Agenda(list({run.key: run for run in ready}.values()), later)


def flops(run: Run) -> float:
    """Training FLOPs of a run, from which the remaining time is estimated."""
    return 3.0 * forward_flops_per_token(run.config.model, run.config.context) * run.tokens
