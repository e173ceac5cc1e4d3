"""Timing of several subjects in turns, with a cold run apart and running out of memory survived."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.harness import Row


@dataclasses.dataclass(frozen=True)
class Case:
    """One subject of a measurement: what to run, and what it costs.

    Attributes:
        key: What tells its row from others.
        run: The call; may return (seconds, cache bytes) where it times a part of itself.
        tokens: Of one call, for the rate.
        flops: That one call must compute.
        bytes: That one call must move.
        peak: Most bytes held since it was last called; None where the framework does not say.
        sizes: What else its row says.
    """

    key: Row
    run: Callable[[], Any]
    tokens: int
    flops: float
    bytes: float
    peak: Callable[[], int | None]
    sizes: Row


def time_cases(cases: Sequence[Case], repetitions: int) -> list[Row]:
    """Warm every case up until two runs agree within a tenth, then time all in turns.

    Returns:
        A row a case; one that ran out of memory has that as its status, and no figures.
    """
    runs = [_Timed(case) for case in cases]
    for run in runs:
        run.warm_up()
    for _ in range(repetitions):
        for run in runs:
            run.repeat()
    rows = [run.row() for run in runs]
    for row in rows:
        _say(row)
    return rows


class _Timed:
    def __init__(self, case: Case):
        self._case = case
        self._seconds: list[float] = []
        self._cold: float | None = None
        self._status = "ok"
        self._extra: Row = {"cache_bytes": None}

    def warm_up(self) -> None:
        last: float | None = None
        for _ in range(3):
            took = self._once()
            if took is None:
                return
            self._cold = took if self._cold is None else self._cold
            if last is not None and abs(took - last) <= 0.1 * last:
                return
            last = took

    def repeat(self) -> None:
        if self._status == "ok" and (took := self._once()) is not None:
            self._seconds.append(took)

    def row(self) -> Row:
        case = self._case
        row = {**case.key, "status": self._status, **self._extra}
        if self._status != "ok":
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
        needs = {"flops": case.flops, "bytes": case.bytes}
        return {**row, "tokens_per_sec": speeds, "ms": median * 1e3, **case.sizes, **needs}

    def _once(self) -> float | None:
        self._case.peak()
        began = time.perf_counter()
        try:
            outcome = self._case.run()
        except (MemoryError, RuntimeError) as e:
            if not isinstance(e, MemoryError) and "memory" not in str(e).lower():
                raise
            self._status = "out of memory"
            return None
        took = time.perf_counter() - began
        # Decoding times its own steps, without the filling of the cache.
        if isinstance(outcome, tuple):
            took, self._extra["cache_bytes"] = outcome
        self._extra["peak_memory_bytes"] = self._case.peak()
        return took


def _say(row: Row) -> None:
    speed = row.get("tokens_per_sec")
    shown = f"{speed['median']:,.1f} tok/s" if speed else row["status"]
    where = f"batch {row['batch']}, {row['context']} tokens"
    print(
        f"{row['measure']:<12} {row['backend']:<6} {row['model']:<36} "
        f"{row['cache'] or '':<13}{where}: {shown}",
        flush=True,
    )
