"""The processes ("ranks") that train one model together.

The framework's engine (`ranks.py` of a backend) exchanges the gradients. The trainer exchanges
everything else through one primitive, `World.gather`. Errors travel with it, so a mistake on any
rank stops every rank with the same message.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from mlx_mla.cli import EXIT_USER
from mlx_mla.errors import UserError
from mlx_mla.files import parse_json, read_text
from mlx_mla.model.config import BackendName

EngineName = Literal["auto", "ring", "jaccl", "mpi", "nccl", "gloo"]
LOST = 1
"""Exit code of a rank that has lost another one. Restarting all ranks may well succeed."""
BLOCK = 512  # bytes that fit into the first message of a gather


class GradientAverage(Protocol):
    """Averages the gradients of one step over all ranks."""

    def last_pass(self) -> AbstractContextManager[None]:
        """Context for the step's last backward pass, during which an engine may start sending."""
        ...

    def mean(self, gradients: Any) -> Any:
        """Return the mean over the ranks of the framework's gradients, summed over the passes."""
        ...


class Alone:
    """The `GradientAverage` of a single rank: returns the gradients unchanged."""

    def last_pass(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mean(self, gradients: Any) -> Any:
        return gradients


class Engine(Protocol):
    """A framework's communication between ranks."""

    rank: int
    size: int

    def all_gather(self, block: np.ndarray) -> np.ndarray:
        """Gather one block from every rank.

        Args:
            block: uint8 (n,), with the same n on every rank.

        Returns:
            The blocks in rank order, (size, n).
        """
        ...

    def broadcast(self, tensor: np.ndarray) -> np.ndarray:
        """Return rank 0's tensor; the other ranks pass one of the same shape and type."""
        ...

    def gradient_average(self, parameters: Iterable[Any]) -> "GradientAverage":
        """Return an object that averages the gradients of a model over the ranks.

        Args:
            parameters: The framework's parameters, in the same order on every rank.
        """
        ...

    def is_loss(self, error: BaseException) -> bool:
        """True if the exception means that another rank can no longer be reached."""
        ...

    def close(self) -> None: ...


class AgreedError(UserError):
    """A user's mistake that every rank knows about; only rank 0 prints it."""


class World:
    """The ranks of a run, as a context manager: all ranks leave it with the same outcome.

    A `UserError` that one rank raises between two calls of `gather` is raised on all ranks. This
    does not cover errors during the exchange of gradients.

    Args:
        engine: The communication between the ranks. None: a single rank, which waits for nobody.
    """

    def __init__(self, engine: Engine | None = None):
        self.engine = engine
        self.rank, self.size = (0, 1) if engine is None else (engine.rank, engine.size)
        self.advice: Callable[[], str] | None = None
        """Advice that rank 0 adds to another rank's error, once there is a checkpoint to resume
        from."""
        self._parent = os.getppid()

    def gather(self, fact: Any = None, error: str | None = None) -> list[Any]:
        """Collect one JSON value from every rank, in rank order. Waits for all ranks.

        Args:
            fact: This rank's value.
            error: The message of an error on this rank.

        Raises:
            UserError: The same on every rank, if any rank passed an error.
        """
        if self.engine is None:
            return [fact]
        messages = [
            json.loads(text) for text in _gather_texts(self.engine, json.dumps([error, fact]))
        ]
        errors = {rank: text for rank, (text, _) in enumerate(messages) if text is not None}
        if errors:
            rank, text = min(errors.items())
            advice = f"; {self.advice()}" if rank and self.advice else ""
            raise AgreedError(text if rank == 0 else f"rank {rank}: {text}{advice}")
        return [fact for _, fact in messages]

    def first(self, fact: Any) -> Any:
        """Return rank 0's value on every rank."""
        return self.gather(fact if self.rank == 0 else None)[0]

    def broadcast(self, tensors: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Return rank 0's tensors by name on every rank; the other ranks pass None."""
        if self.engine is None:
            return dict(tensors or {})
        own = tensors or {}
        listed = self.first([[name, list(t.shape), str(t.dtype)] for name, t in own.items()])
        send = self.engine.broadcast
        return {n: send(own[n] if n in own else np.zeros(shape, dt)) for n, shape, dt in listed}

    def gradient_average(self, parameters: Iterable[Any]) -> GradientAverage:
        """See `Engine.gradient_average`."""
        return Alone() if self.engine is None else self.engine.gradient_average(parameters)

    def launcher_has_gone(self) -> bool:
        """True if the process that started this rank has ended.

        No signal reports this. Output then goes to the null device, since nobody reads it.
        """
        if self.size == 1 or os.getppid() == self._parent:
            return False
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        os.close(null)
        return True

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, error_type: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.engine is None:
            return
        failure = error
        if error is None or (isinstance(error, UserError) and not isinstance(error, AgreedError)):
            try:
                # No rank leaves before all have finished.
                self.gather(error=None if error is None else str(error))
            except Exception as e:
                failure = e if error is None or isinstance(e, AgreedError) else error
        # A launcher stops the other ranks as soon as one fails. Each must still print its error.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            self.engine.close()
        if failure is not None and self.engine.is_loss(failure):
            reason = " ".join(str(failure).split()).split(". ")[0]
            advice = self.advice() if self.advice else "start all ranks again, with --auto-resume"
            print(
                f"error: rank {self.rank} has lost another rank ({reason}); {advice}",
                file=sys.stderr,
            )
            raise SystemExit(LOST) from None
        if isinstance(failure, AgreedError) and self.rank:
            raise SystemExit(EXIT_USER) from None
        if failure is not None and failure is not error:
            raise failure


SOLO = World()


def _gather_texts(engine: Engine, text: str) -> list[str]:
    content = np.frombuffer(text.encode(), np.uint8)
    size = np.array([len(content)], "<u4").view(np.uint8)
    start = engine.all_gather(_padded(np.concatenate([size, content[: BLOCK - 4]]), BLOCK))
    lengths = [int(row[:4].view("<u4")[0]) for row in np.ascontiguousarray(start)]
    whole = start[:, 4:]
    if (more := max(lengths) - (BLOCK - 4)) > 0:
        whole = np.concatenate(
            [whole, engine.all_gather(_padded(content[BLOCK - 4 :], more))], axis=1
        )
    return [row[:n].tobytes().decode() for row, n in zip(whole, lengths, strict=True)]


def _padded(block: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([block, np.zeros(size - len(block), np.uint8)])


def launched_by() -> BackendName | None:
    """The framework whose launcher started this process as one of several; None without one."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env and int(env.get("WORLD_SIZE", "1")) > 1:
        return "torch"
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):  # ring, jaccl: a list of hosts
        if "MLX_RANK" in env and name in env:
            text = env[name] if env[name].lstrip().startswith("[") else read_text(Path(env[name]))
            if text.strip() and len(parse_json(text, name)) > 1:
                return "mlx"
    sizes = (env.get("MLX_WORLD_SIZE"), env.get("OMPI_COMM_WORLD_SIZE"))  # NCCL, MPI
    return "mlx" if any(size and int(size) > 1 for size in sizes) else None


def join(engine: EngineName, get_engine: Callable[[BackendName, str], Engine]) -> World:
    """Join the world that a launcher made this process part of.

    Args:
        get_engine: Creates the engine of that name for a framework.

    Returns:
        The world; `SOLO` without a launcher.

    Raises:
        UserError: If the engine is not available.
    """
    launcher = launched_by()
    return SOLO if launcher is None else World(get_engine(launcher, engine))


def same_everywhere(world: World, fact: str, what: str) -> None:
    """Raise the same UserError on every rank if `fact` differs from rank 0's on any rank."""
    facts = world.gather(fact)
    differing = [str(rank) for rank, other in enumerate(facts) if other != facts[0]]
    if differing:
        ranks = (
            f"rank {differing[0]} has"
            if len(differing) == 1
            else f"ranks {', '.join(differing)} have"
        )
        raise UserError(f"{ranks} {what} than rank 0; all ranks need the same")


class Share(NamedTuple):
    """One rank's share of an optimizer step."""

    passes: int
    sequences: int
    """Sequences in each pass."""


def share_of(world_size: int, batch_size: int, grad_accum_steps: int) -> Share:
    """Split a step among the ranks.

    A step has batch_size x grad_accum_steps sequences in total. Each rank's share is split into the
    fewest equal passes of at most batch_size sequences.

    Raises:
        UserError: If the ranks cannot share a step evenly.
    """
    total = batch_size * grad_accum_steps
    if total % world_size:
        fitting = ", ".join(
            str(n) for n in range(1, total + 1) if total % n == 0 and n <= 4 * world_size
        )
        raise UserError(
            f"{world_size} ranks cannot share the {total} sequences of a step (--batch-size "
            f"{batch_size} x --grad-accum-steps {grad_accum_steps}) evenly; start {fitting} ranks, "
            f"or make it a multiple of {world_size}"
        )
    share = total // world_size
    count = next(n for n in range(-(-share // batch_size), share + 1) if share % n == 0)
    return Share(count, share // count)
