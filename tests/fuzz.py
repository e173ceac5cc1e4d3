"""A seeded mutation fuzzer: commands are given spoiled files, and must end as they promise.

A case is made from a `random.Random` that is seeded with the run's seed and the case's number, both
of which a failure names:

    def spoil(random, folder):  # writes what the command reads, and returns its arguments
        (folder / "x.json").write_bytes(mutate_json(random, {"a": 1}))
        return ["--file", str(folder / "x.json")]

    fuzz(command.main, spoil, cases=50, seed=1, folder=tmp_path)
"""

import contextlib
import io
import json
import os
import random as _random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mlx_mla.machine import peak_memory
from mlx_mla.model import estimate

Random = _random.Random
Main = Callable[[Sequence[str]], int]
Spoil = Callable[[Random, Path], Sequence[str]]

SECONDS = 20
"""Of processor time, so that a busy machine shows no hang that is none."""
LONGEST_WAIT = 6
"""Times as many seconds may pass, whatever a command waits for."""
MEMORY = int(2.5 * 2**30)
LONGEST_LINE = 1000
"""Characters of an error line; what it echoes of the input is cut, but paths may be long."""


@contextlib.contextmanager
def small_machine() -> Iterator[None]:
    """A machine of 512 MiB, for which what would break the promised memory is refused."""
    with mock.patch.object(estimate, "physical_memory", lambda: 2**29):
        yield


class Hang(BaseException):
    """Not an Exception, so no command mistakes it for an error in its input."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """Exit code; None where it raised, and `stderr` then ends in the traceback."""
    stdout: str
    stderr: str
    seconds: float
    """Of processor time."""
    peak_bytes: int
    """Most memory resident at once, beyond what the test process held before."""
    hung: bool = False
    """Whether it was still running after `SECONDS`, and was ended."""


def run(main: Main, argv: Sequence[str]) -> Outcome:
    """Run a command in this process; what libraries write to the file descriptors counts too."""
    began, trace = time.process_time(), ""
    code: int | None = None
    hung = False
    _reset_peak()
    before = peak_memory()
    with _captured() as texts, mock.patch("os.fsync"):  # nobody pulls the plug
        try:
            with _alarm(SECONDS):
                code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except KeyboardInterrupt:
            raise
        except Hang:
            hung, trace = True, traceback.format_exc()
        except BaseException:  # Rust's panics among them
            trace = traceback.format_exc()
    seconds = time.process_time() - began
    return Outcome(code, texts[0], texts[1] + trace, seconds, peak_memory() - before, hung)


def broken_promise(outcome: Outcome) -> str | None:
    """What a command did that none may do, in words; None if it ended well.

    Promised are exit code 0, or 2 with exactly one line on stderr that begins with `error: `; no
    traceback; and bounded time and memory.
    """
    if outcome.hung:
        return "a hang"
    if outcome.code is None or "Traceback (most recent call last)" in outcome.stderr:
        return "a traceback"
    if outcome.code not in (0, 2):
        return f"exit code {outcome.code}"
    if outcome.seconds > SECONDS:
        return f"{outcome.seconds:.0f} s"
    if outcome.peak_bytes > MEMORY:
        return f"{outcome.peak_bytes / 2**30:.1f} GiB"
    lines = outcome.stderr.splitlines()
    if outcome.code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        return f"exit code 2 with {len(lines)} lines on stderr"
    if outcome.code == 2 and len(lines[0]) > LONGEST_LINE:
        return f"an error line of {len(lines[0])} characters"
    return None


def fuzz(
    main: Main, spoil: Spoil, cases: int, seed: int, folder: Path, name: str = ""
) -> Counter[int | None]:
    """Run a command on spoiled input again and again; returns how often it ended with each code.

    Args:
        main: The command.
        spoil: Writes a case's files into an empty folder and returns the arguments.
        cases: How many.
        seed: Decides them all.
        folder: Where the cases' folders come and go; that of a failure stays.
        name: Of the surface, for `table`.

    Raises:
        AssertionError: Naming seed and case of each failure, with what the first of them printed.
    """
    tally = Tally(name, cases)
    TALLIES.append(tally)
    failures = []
    for case in range(cases):
        outcome, failure = run_case(main, spoil, seed, case, folder)
        tally.count(outcome)
        if failure:
            failures.append(failure)
    if failures:
        others = [failure.splitlines()[0] for failure in failures[1:]]
        raise AssertionError("\n".join([failures[0], *others]))
    return tally.codes


def run_case(
    main: Main, spoil: Spoil, seed: int, case: int, folder: Path
) -> tuple[Outcome, str | None]:
    """One case, by its seed and number: how it ended, and what was wrong with that."""
    own = folder / f"case-{seed}-{case}"
    own.mkdir(parents=True)
    argv = spoil(Random(f"{seed}-{case}"), own)
    outcome = run(main, argv)
    if problem := broken_promise(outcome):
        said = f"{argv}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-6000:]}"
        return outcome, f"seed {seed}, case {case}: {problem}\n{said}"
    shutil.rmtree(own)
    return outcome, None


@dataclass
class Tally:
    """How the cases of a surface ended."""

    name: str
    cases: int
    codes: Counter[int | None] = field(default_factory=Counter)
    broken: int = 0
    tracebacks: int = 0
    hangs: int = 0
    too_large: int = 0
    longest: float = 0.0
    """Seconds."""
    peak_bytes: int = 0

    def count(self, outcome: Outcome) -> None:
        self.codes[outcome.code] += 1
        self.broken += broken_promise(outcome) is not None
        hung = outcome.hung or outcome.seconds > SECONDS
        self.hangs += hung
        self.tracebacks += outcome.code is None and not hung
        self.too_large += outcome.peak_bytes > MEMORY
        self.longest = max(self.longest, outcome.seconds)
        self.peak_bytes = max(self.peak_bytes, outcome.peak_bytes)


TALLIES: list[Tally] = []
"""Of this process, in the order of the runs."""


def table() -> str:
    """The tallies in Markdown, with their sum."""
    total = Tally("all", sum(t.cases for t in TALLIES))
    for tally in TALLIES:
        total.codes += tally.codes
        for name in ("broken", "tracebacks", "hangs", "too_large"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        total.longest = max(total.longest, tally.longest)
        total.peak_bytes = max(total.peak_bytes, tally.peak_bytes)
    lines = [
        "| surface | cases | used | refused | tracebacks | over 20 s | over 2.5 GiB | all "
        "failures | longest | peak |",
        "|---|" + "--:|" * 9,
    ]
    for t in (*TALLIES, total):
        lines.append(
            f"| {t.name} | {t.cases:,} | {t.codes[0]:,} | {t.codes[2]:,} | {t.tracebacks} | "
            f"{t.hangs} | {t.too_large} | {t.broken} | {t.longest:.1f} s | "
            f"{t.peak_bytes / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


# Mutators: what goes in is whole, what comes out is spoiled in a few places, or by chance not.

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63)


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Flipped, overwritten, removed, repeated, inserted or cut bytes."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(out) + 1)
        end = min(len(out), at + random.choice((1, 1, 4, 64, 4096)))
        what = random.randrange(8)
        if what == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif what == 1:
            out[at:end] = random.randbytes(end - at)
        elif what == 2:
            del out[at:end]
        elif what == 3:
            out[at:at] = out[at:end]
        elif what == 4:
            out[at:at] = random.randbytes(random.choice((1, 2, 8, 300)))
        elif what == 5:
            out[at:end] = bytes(end - at)
        elif what == 6:
            form, size = random.choice((("<i", 32), ("<q", 64), (">I", 32)))
            number = random.choice(NUMBERS) % 2**size
            if form[1].islower() and number >= 2 ** (size - 1):
                number -= 2**size
            packed = struct.pack(form, number)
            out[at : at + len(packed)] = packed
        else:
            del out[at:]
    return bytes(out)


ODD_TEXTS = (
    b"", b" ", b"\x00", b"\r\n", b"\n\n\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80",
    b"\xc3", b"\xe2\x80\xa8", b"\x0c", b"\x1b[31m", b"%s{}", b"[/red]", b"$\\foo$", b"\xf4\x90",
    b"<|endoftext|>", b"nan", b"1e999", b"-0", b"9" * 5000, b"a" * 3000, b"../../x", b"[" * 3000,
    b"{" * 3000, "e\u0301\u202e\u200d\U0001f469".encode(),
)  # fmt: skip


def mutate_text(random: Random, text: str) -> bytes:
    """Text with odd characters, broken UTF-8, lines that are lost or repeated, or spoiled bytes."""
    data = text.encode()
    for _ in range(random.choice((1, 1, 2, 4))):
        what = random.randrange(4)
        at = random.randrange(len(data) + 1)
        lines = data.splitlines(keepends=True)
        if what == 0:
            data = data[:at] + random.choice(ODD_TEXTS) + data[at:]
        elif what == 1 and lines:
            del lines[random.randrange(len(lines))]
            data = b"".join(lines)
        elif what == 2 and lines:
            data += random.choice(lines) * random.choice((1, 3, 100))
        else:
            data = mutate_bytes(random, data)
    return data


# Numbers and depths that `json` cannot write; they are put in once it has.
_HUGE, _DEEP, _CYCLE = "@huge@", "@deep@", "@objects@"
_UNWRITABLE = {
    _HUGE: "9" * 5000,
    _DEEP: "[" * 50_000 + "]" * 50_000,
    _CYCLE: '{"a":' * 50_000 + "1" + "}" * 50_000,
}
ODD_VALUES = (
    None, True, False, "", "x", "\ud800", "\x00", "a" * 5000, "../../etc/passwd", [], {}, [1], [[]],
    {"a": 1}, [None], 0.5, -0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), float("-inf"),
    _HUGE, _DEEP, _CYCLE, 10**400, -(10**400), *NUMBERS,
)  # fmt: skip


def mutate_json(random: Random, value: Any) -> bytes:
    """JSON of a value in which some values, keys or types are others; sometimes no JSON at all."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _mutate_value(random, value)
    data = json.dumps(value).encode()
    for mark, text in _UNWRITABLE.items():
        data = data.replace(f'"{mark}"'.encode(), text.encode())
    if random.random() < 0.15:
        data = mutate_bytes(random, data)
    if random.random() < 0.05:
        utf16 = data.decode("latin-1").encode("utf-16")
        data = random.choice((b"\xef\xbb\xbf" + data, utf16, b"\xff" + data))
    return data


def _mutate_value(random: Random, value: Any) -> Any:
    """The value with one place, found by going down at random, changed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        what = random.randrange(10)
        if what == 0:
            return {k: v for k, v in value.items() if k != key}
        if what == 1:
            return {(k + "_" if k == key else k): v for k, v in value.items()}
        if what == 2:
            return value | {random.choice(("", "x", "\ud800", "a" * 500)): value[key]}
        if what == 3:
            return value | {random.choice(list(value)): value[key]}
        return value | {key: _mutate_value(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        what = random.randrange(6)
        if what == 0:
            return value[:at] + value[at + 1 :]
        if what == 1:
            return value + [value[at]] * random.choice((1, 2, 1000))
        return [*value[:at], _mutate_value(random, value[at]), *value[at + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.3:
        return random.choice((-value, value + 1, value - 1, value * 2, value * 1000, str(value)))
    return random.choice(ODD_VALUES)


def mutate_json_lines(random: Random, data: bytes) -> bytes:
    """JSON lines of which some are mutated, others lost, repeated or cut."""
    lines = [line for line in data.split(b"\n") if line]
    for at in {random.randrange(len(lines)) for _ in range(random.choice((1, 1, 2)))}:
        lines[at] = mutate_json(random, json.loads(lines[at]))
    what = random.randrange(8)
    if what == 0:
        lines += [random.choice(lines)] * random.choice((1, 3))
    elif what == 1:
        del lines[random.randrange(len(lines))]
    whole = b"\n".join(lines) + b"\n"
    return whole[: random.randrange(len(whole))] if what == 2 else whole


def mutate_toml(random: Random, text: str) -> bytes:
    """TOML in which a value or two is of another type or range, or the text itself is spoiled."""
    if random.random() < 0.3:
        return mutate_text(random, text)
    lines = text.splitlines()
    for _ in range(random.choice((1, 1, 2))):
        at = random.choice([i for i, line in enumerate(lines) if "=" in line])
        name, _, value = lines[at].partition("=")
        if random.random() < 0.2:
            name = random.choice((name.rstrip() + "x ", "'' ", "preset ", "data ", "steps "))
        elif "[" in value and random.random() < 0.4:
            value = value.replace("[", f"[{random.choice(ODD_TOML)}, ", 1)
        else:
            value = random.choice(ODD_TOML)
        lines[at] = f"{name}= {value}"
    return "\n".join(lines).encode()


ODD_TOML = (
    "nan", "inf", "-inf", "-1", "0", "0.5", "1e400", "1e308", "1e-320", "''", "'x'", '"\\u0000"',
    "'../x'", "['a']", "[]", "[[1]]", "[1, 1]", "{}", "{ a = 1 }", "true", "1979-05-27", "07:32:00",
    "9" * 400, "9" * 5000, "[" * 5000, *map(str, NUMBERS),
)  # fmt: skip


def mutate_opcodes(random: Random, data: bytes) -> bytes:
    """A pickle with other bytes, or with runs of operations that nest or end containers."""
    if random.random() < 0.5:
        return mutate_bytes(random, data)
    run = random.choice((b"]", b"}", b")", b"(", b"a", b"t", b"l", b"d", b"u", b"s"))
    run = random.choice((run, b"\x85", b"\x85", b"\x86", b"\x87", b"2", b"0", b"}N"))
    at = random.randrange(len(data) + 1)
    return data[:at] + run * random.choice((1, 3, 99, 101, 5000, 300_000)) + data[at:]


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """A safetensors file with another header, other values, or spoiled bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = random.randrange(8)
    if what == 0:
        return mutate_bytes(random, data)
    if what == 1:
        return struct.pack("<Q", random.choice(NUMBERS) % 2**64) + data[8:]
    if what == 2:
        return data[: random.randrange(len(data))]
    if what == 3:  # values that are not finite
        at = random.randrange(0, max(1, len(body) - 4), 4)
        odd = random.choice((float("nan"), float("inf"), float("-inf"), 3e38))
        return data[: 8 + length] + body[:at] + struct.pack("<f", odd) + body[at + 4 :]
    name = random.choice([n for n in header if n != "__metadata__"])
    if what == 4:
        kinds = ("F64", "F16", "BF16", "F8_E4M3", "I64", "I32", "U8", "BOOL", "C64", "F4", "X")
        header[name]["dtype"] = random.choice(kinds)
    elif what == 5:
        header[random.choice((f"_orig_mod.{name}", "x", name + "_", ""))] = header.pop(name)
    elif what == 6 and header[name]["shape"]:
        header[name]["shape"] = random.choice(
            ([1, *header[name]["shape"]], header[name]["shape"][::-1], [0], [2**40, 2**40], [-1])
        )
    else:
        header = mutate_json(random, header)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# Never closed: handlers of logging that are made during a case keep what they find.
_DESCRIPTORS = tuple(
    io.TextIOWrapper(io.FileIO(fd, "wb", closefd=False), "utf-8", write_through=True)
    for fd in (1, 2)
)


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Catch what is written to standard output and error, by Python or below it.

    Yields:
        A list that holds both texts on leaving.
    """
    texts: list[str] = []
    streams, saved = (sys.stdout, sys.stderr), [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            for fd, (stream, file) in enumerate(zip(streams, (out, err)), 1):
                stream.flush()
                os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = _DESCRIPTORS
            yield texts
        finally:
            sys.stdout, sys.stderr = streams
            for fd, old in enumerate(saved, 1):
                os.dup2(old, fd)
                os.close(old)
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, seconds),
        signal.SIGALRM: (signal.ITIMER_REAL, LONGEST_WAIT * seconds),
    }
    before = {number: signal.signal(number, ring) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def _reset_peak() -> None:
    """Forget the most memory that was resident, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
