"""Measure what averaging gradients over ranks adds to a training step.

    mlx.launch -n 2 -- python -m bench reduction [--preset nano]
    torchrun --nproc-per-node 2 -m bench reduction --backend torch

Steps with and without the averaging take turns on every rank. Prints a table; figures are medians
with the smallest and largest beside them, of rank 0.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from bench.subjects.contract import seconds
from bench.timing import turns
from mlx_mla import cli
from mlx_mla.backends import get_backend, get_engine
from mlx_mla.backends.contract import Start
from mlx_mla.errors import UserError
from mlx_mla.model.config import BackendName
from mlx_mla.model.presets import preset
from mlx_mla.model.weights import initial_weights, num_parameters
from mlx_mla.world import EngineName, join

PROG = "python -m bench reduction"


@dataclasses.dataclass(kw_only=True)
class Reduction:
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


def run(argv: Sequence[str]) -> int:
    """Measure on all ranks, and print the table on rank 0; returns the exit code."""
    options = cli.parse(Reduction, argv, PROG)
    with join(options.distributed_backend, get_engine) as world:
        if world.size == 1:
            raise UserError("start this by mlx.launch -n 2 or torchrun --nproc-per-node 2")
        config = preset(options.preset).resolved()
        assert config.model.vocab_size
        weights = initial_weights(config.model, config.seed, config.initializer_range)
        backend = get_backend(options.backend)
        averaging = backend.train_session(config, Start(weights), world=world)
        alone = backend.train_session(config, Start(weights))
        shape = (options.batch_size, config.context + 1)
        ids = np.random.default_rng(world.rank).integers(0, config.model.vocab_size, shape)
        batches = [(ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32))]
        batches *= options.grad_accum_steps

        def timed(work: Callable[[], object]) -> float:
            world.gather()  # all begin together
            return seconds(work)

        actions: dict[str, Callable[[], object]] = {
            "step, averaged": lambda: averaging.step(0, 1e-4, batches),
            "step, alone": lambda: alone.step(0, 1e-4, batches),
            "agreeing (two a step)": lambda: (world.gather(1.0), world.gather()),
        }
        found = turns(
            {name: functools.partial(timed, work) for name, work in actions.items()},
            options.repetitions,
            warm_up=2,
        )
        if world.rank == 0:
            nbytes = 4 * num_parameters(config.model)
            print(
                f"{options.preset}, {options.backend}, {world.size} ranks: {nbytes:,} bytes of "
                "gradients a step"
            )
            for name, values in found.items():
                low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
                print(f"{name:<24}{middle:8.2f} ms  ({low:.2f} to {high:.2f})")
    return 0
