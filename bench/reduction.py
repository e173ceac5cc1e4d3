"""Measure what averaging gradients over ranks adds to a training step.

    mlx.launch -n 2 -- python -m bench.reduction [--preset nano]
    torchrun --nproc-per-node 2 bench/reduction.py --backend torch

Steps with and without the averaging take turns on every rank. Prints a table; figures are medians
with the smallest and largest beside them, of rank 0.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from mlx_mla import cli
from mlx_mla.backends import get_backend, get_engine
from mlx_mla.backends.contract import Start
from mlx_mla.errors import UserError
from mlx_mla.model.config import BackendName
from mlx_mla.model.presets import preset
from mlx_mla.model.weights import initial_weights, num_parameters
from mlx_mla.world import EngineName, join

PROG = "python -m bench.reduction"


@dataclasses.dataclass(kw_only=True)
class ReductionBench:
    """Measure what averaging gradients over the ranks of a launcher adds to a training step."""

    preset: str = "nano"
    """Model and batch size."""
    batch_size: int = 4
    """Sequences of one rank in one pass."""
    grad_accum_steps: int = 1
    """Passes of one rank in a step."""
    repetitions: int = 20
    """Steps of each kind."""
    backend: BackendName = "mlx"
    """Framework."""
    distributed_backend: EngineName = "auto"
    """Engine, as for mlx_mla.train."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    options = cli.parse(ReductionBench, argv, PROG)
    with join(options.distributed_backend, get_engine) as world:
        if world.size == 1:
            raise UserError("start this by mlx.launch -n 2 or torchrun --nproc-per-node 2")
        config = preset(options.preset).resolved()
        assert config.model.vocab_size
        weights = initial_weights(config.model, config.seed, config.initializer_range)
        backend = get_backend(options.backend)
        averaging = backend.train_session(config, Start(weights), world=world)
        alone = backend.train_session(config, Start(weights))
        rng = np.random.default_rng(world.rank)
        ids = rng.integers(
            0, config.model.vocab_size, (options.batch_size, config.context + 1)
        ).astype(np.int32)
        batches = [(ids[:, :-1], ids[:, 1:])] * options.grad_accum_steps
        times: dict[str, list[float]] = {
            "step, averaged": [],
            "step, alone": [],
            "agreeing (two a step)": [],
        }
        for step in range(options.repetitions + 2):  # the first two warm up
            for name, work in (
                ("step, averaged", lambda n=step: averaging.step(n, 1e-4, batches)),
                ("step, alone", lambda n=step: alone.step(n, 1e-4, batches)),
                ("agreeing (two a step)", lambda: (world.gather(1.0), world.gather())),
            ):
                world.gather()  # all begin together
                times[name].append(_seconds(work))
        if world.rank == 0:
            nbytes = 4 * num_parameters(config.model)
            print(
                f"{options.preset}, {options.backend}, {world.size} ranks: {nbytes:,} bytes of "
                "gradients a step"
            )
            for name, values in times.items():
                v = [1e3 * value for value in values[2:]]
                print(f"{name:<24}{statistics.median(v):8.2f} ms  ({min(v):.2f} to {max(v):.2f})")
    return 0


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
