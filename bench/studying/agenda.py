"""What a study has still to run."""

import dataclasses

from bench.studying.plan import Cell, Run, Study
from bench.studying.results import Results
from mlx_mla.estimate import forward_flops_per_token


@dataclasses.dataclass(frozen=True)
class Agenda:
    """What to run next, and what will follow."""

    ready: list[Run]
    """Runs that wait for nothing, in the order to start them."""
    later: list[Run]
    """Runs that wait for a rate to be found; their rates are placeholders."""


def agenda(study: Study, results: Results) -> Agenda:
    """What the finished runs leave to do.

    Sizes come in the order of the file; in each, all arms' rates before any seed, then seed by seed
    all arms, so that whatever has finished can be compared.
    """
    ready: list[Run] = []
    later: list[Run] = []
    for size in study.sizes:
        repeated: list[tuple[int, Run]] = []
        for cell in study.cells:
            if cell.size != size:
                continue
            found = results.search(cell, study.extensions)
            ready += [cell.tuning(rate) for rate in found.wanted]
            if found.wanted:
                later += [cell.final(cell.rates[0], seed) for seed in cell.seeds]
            elif found.best is not None:
                runs = [cell.final(found.best, seed) for seed in cell.seeds]
                repeated += [(i, r) for i, r in enumerate(runs) if results.get(r) is None]
        ready += [run for _, run in sorted(repeated, key=lambda pair: pair[0])]
    # Budgets that are tuned with the same tokens share their tuning runs.
    return Agenda(list({run.key: run for run in ready}.values()), later)


def flops(run: Run) -> float:
    """Training FLOPs of a run, by which times are told in advance."""
    return 3.0 * forward_flops_per_token(run.config.model, run.config.context) * run.tokens


def best_run(study: Study, results: Results, cell: Cell) -> Run | None:
    """The first seed's run at the rate that was found, which stands for its cell."""
    best = results.search(cell, study.extensions).best
    return None if best is None else cell.final(best, cell.seeds[0])
