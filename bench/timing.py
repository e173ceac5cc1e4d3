"""Timing of several subjects, one of them in memory at a time, with a cold run apart and running
out of memory survived.

Every subject is loaded twice: in order for the first half of its runs and backwards for the second,
so that a machine that drifts does so for all alike, as if they took turns run by run. That would
need all of them in memory at once, which a machine of 16 GB pays for by swapping.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from bench import subjects
from bench.harness import Row
from bench.subjects.contract import Timed

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Case:
    """One subject of a measurement: what to run, and what it costs.

    Attributes:
        key: What tells its row from others; cases of one "backend" and "model" share a subject.
        load: Puts the subject into memory: a `Subject` or a `Trainer`.
        run: The call, on the subject; may return a `Timed` where it times a part of itself.
        tokens: Of one call, for the rate.
        flops: That one call must compute.
        bytes: That one call must move.
        sizes: What else its row says.
    """

    key: Row
    load: Callable[[], Any]
    run: Callable[[Any], Any]
    tokens: int
    flops: float
    bytes: float
    sizes: Row


def there_and_back(items: Sequence[T], repetitions: int) -> Iterator[tuple[T, int]]:
    """Each item with how many of its repetitions are due: half in order, the rest backwards.

    The last one's two halves follow each other and are one.
    """
    first = (repetitions + 1) // 2
    for i, item in enumerate(items):
        yield item, repetitions if i == len(items) - 1 else first
    if repetitions > first:
        for item in reversed(items[:-1]):
            yield item, repetitions - first


def time_cases(cases: Sequence[Case], repetitions: int) -> list[Row]:
    """Time cases, those of one subject in turns while it is in memory.

    When a subject is loaded first, each of its cases is warmed up until two runs agree within a
    tenth; the second time by one run.

    Returns:
        A row a case; one that ran out of memory has that as its status, and no figures.
    """
    runs = [_Run(case) for case in cases]
    groups: dict[tuple[str, str], list[_Run]] = {}
    for run in runs:
        groups.setdefault((run.case.key["backend"], run.case.key["model"]), []).append(run)
    for own, count in there_and_back(list(groups.values()), repetitions):
        _visit(own, count)
        subjects.release(own[0].case.key["backend"])
    rows = [run.row() for run in runs]
    for row in rows:
        _say(row)
    return rows


def _visit(own: Sequence["_Run"], count: int) -> None:
    try:
        subject = own[0].case.load()
    except (MemoryError, RuntimeError) as e:
        _only_memory(e)
        for run in own:
            run.status = "out of memory"
        return
    for run in own:
        run.warm_up(subject)
    for _ in range(count):
        for run in own:
            run.repeat(subject)


def _only_memory(error: Exception) -> None:
    """Raise what is not about memory."""
    if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
        raise error


class _Run:
    def __init__(self, case: Case):
        self.case, self.status = case, "ok"
        self._seconds: list[float] = []
        self._waited: list[float] = []
        self._peaks: list[int] = []
        self._cold: float | None = None
        self._cache_bytes: int | None = None

    def warm_up(self, subject: Any) -> None:
        last: float | None = None
        for _ in range(3 if self._cold is None else 1):
            timed = self._once(subject)
            if timed is None:
                return
            took = timed.seconds
            self._cold = took if self._cold is None else self._cold
            if last is not None and abs(took - last) <= 0.1 * last:
                return
            last = took

    def repeat(self, subject: Any) -> None:
        timed = self._once(subject)
        if timed is None:
            return
        self._seconds.append(timed.seconds)
        self._cache_bytes = timed.cache_bytes
        if timed.waited is not None:
            self._waited.append(timed.waited)
        if (peak := subject.memory.peak()) is not None:
            self._peaks.append(peak)

    def row(self) -> Row:
        case = self.case
        row = {**case.key, "status": self.status}
        if self.status != "ok":
            return row
        assert self._cold is not None
        median = statistics.median(self._seconds)
        speeds = {
            "median": case.tokens / median,
            "min": case.tokens / max(self._seconds),
            "max": case.tokens / min(self._seconds),
            "cold": case.tokens / self._cold,
            "values": [case.tokens / t for t in self._seconds],
        }
        return {
            **row,
            "tokens_per_sec": speeds,
            "ms": median * 1e3,
            "waited_ms": statistics.median(self._waited) * 1e3 if self._waited else None,
            "peak_bytes": max(self._peaks, default=None),
            "cache_bytes": self._cache_bytes,
            **case.sizes,
            "flops": case.flops,
            "bytes": case.bytes,
        }

    def _once(self, subject: Any) -> Timed | None:
        if self.status != "ok":
            return None
        subject.memory.reset()
        began = time.perf_counter()
        try:
            outcome = self.case.run(subject)
        except (MemoryError, RuntimeError) as e:
            _only_memory(e)
            self.status = "out of memory"
            return None
        took = time.perf_counter() - began
        return outcome if isinstance(outcome, Timed) else Timed(took)


def _say(row: Row) -> None:
    speed = row.get("tokens_per_sec")
    shown = f"{speed['median']:,.1f} tok/s" if speed else row["status"]
    where = f"batch {row['batch']}, {row['context']} tokens"
    print(
        f"{row['measure']:<12} {row['backend']:<6} {row['model']:<36} "
        f"{row['cache'] or '':<13}{where}: {shown}",
        flush=True,
    )
