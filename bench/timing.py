"""Taking turns, medians, and the timing of subjects, one in memory at a time."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bench import subjects
from bench.rows import Row
from bench.subjects.contract import Timed

K = TypeVar("K")
T = TypeVar("T")


def turns(
    actions: Mapping[K, Callable[[], T]], repetitions: int, warm_up: int = 1
) -> dict[K, list[T]]:
    """Run all actions in turns, so that drift of the machine hits them equally.

    Returns:
        What each returned, without its first `warm_up` runs.
    """
    results: dict[K, list[T]] = {name: [] for name in actions}
    for _ in range(warm_up + repetitions):
        for name, action in actions.items():
            results[name].append(action())
    return {name: values[warm_up:] for name, values in results.items()}


def abba_order(items: Sequence[T], repetitions: int) -> Iterator[tuple[T, int]]:
    """Each item with its due repetitions: half of them in order, the rest backwards.

    Drift of the machine hits the items equally, as in turns, but each is visited twice only. The
    last item's two halves follow each other and are one.
    """
    first = (repetitions + 1) // 2
    for i, item in enumerate(items):
        yield item, repetitions if i == len(items) - 1 else first
    if repetitions > first:
        for item in reversed(items[:-1]):
            yield item, repetitions - first


@dataclasses.dataclass
class Case:
    """One subject of a measurement: what to run, and what it costs.

    Attributes:
        row: Its row, which `time_cases` completes. Cases of one backend and model share a subject.
        load: Puts the subject, a `Subject` or a `Trainer`, into memory.
        run: The call, on the subject; may return a `Timed` where it times a part of itself.
        tokens: Of one call, for the rate. 0: no rate.
    """

    row: Row
    load: Callable[[], Any]
    run: Callable[[Any], Any]
    tokens: int

    def __post_init__(self) -> None:
        self._timed: list[Timed] = []
        self._peaks: list[int] = []
        self._cold: float | None = None

    def warm_up(self, subject: Any) -> None:
        """Run until two runs agree within a tenth; in a later visit once."""
        last: float | None = None
        for _ in range(3 if self._cold is None else 1):
            timed = self._once(subject)
            if timed is None:
                return
            self._cold = timed.seconds if self._cold is None else self._cold
            if last is not None and abs(timed.seconds - last) <= 0.1 * last:
                return
            last = timed.seconds

    def repeat(self, subject: Any) -> None:
        """A timed run."""
        if timed := self._once(subject):
            self._timed.append(timed)
            self._peaks += [peak] if (peak := subject.memory.peak()) is not None else []

    def completed(self) -> Row:
        """The row with the figures of all runs."""
        row = self.row
        if row.status != "ok":
            return row
        seconds = [t.seconds for t in self._timed]
        row.ms = _median_ms(seconds)
        row.waited_ms = _median_ms([t.waited for t in self._timed])
        row.peak_bytes = max(self._peaks, default=None)
        row.cache_bytes = self._timed[-1].cache_bytes
        if self.tokens:
            assert self._cold is not None
            row.tokens_per_sec = {
                "median": self.tokens / statistics.median(seconds),
                "min": self.tokens / max(seconds),
                "max": self.tokens / min(seconds),
                "cold": self.tokens / self._cold,
                "values": [self.tokens / t for t in seconds],
            }
        return row

    def _once(self, subject: Any) -> Timed | None:
        if self.row.status != "ok":
            return None
        subject.memory.reset()
        began = time.perf_counter()
        with _if_memory_suffices([self]):
            outcome = self.run(subject)
            took = time.perf_counter() - began
            return outcome if isinstance(outcome, Timed) else Timed(took)
        return None


def time_cases(cases: Sequence[Case], repetitions: int) -> list[Row]:
    """Time cases in ABBA order, those of one subject in turns while it is in memory.

    Returns:
        A row for each case. One that ran out of memory has that as its status, and no figures.
    """
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.row.backend, case.row.model), []).append(case)
    for own, count in abba_order(list(groups.values()), repetitions):
        _visit(own, count)
        subjects.framework(own[0].row.backend).release()
    return [case.completed() for case in cases]


def _visit(own: Sequence[Case], count: int) -> None:
    with _if_memory_suffices(own):
        subject = own[0].load()
        for case in own:
            case.warm_up(subject)
        turns({i: functools.partial(c.repeat, subject) for i, c in enumerate(own)}, count, 0)


@contextlib.contextmanager
def _if_memory_suffices(cases: Sequence[Case]) -> Iterator[None]:
    """Mark the cases as out of memory if the block is."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and "memory" not in str(e).lower():
            raise
        for case in cases:
            case.row.status = "out of memory"


def _median_ms(seconds: Sequence[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return 1e3 * statistics.median(known) if known else None
