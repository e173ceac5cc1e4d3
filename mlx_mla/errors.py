"""The one exception that means "the user's input was wrong", how its messages quote a value, and
the hints that a command prints when it succeeds."""

import difflib
import reprlib
import sys
from collections.abc import Iterable
from typing import Any

_LONGEST = 60
_quote = reprlib.Repr()
_quote.maxstring = _quote.maxother = _quote.maxlong = _LONGEST


def shown(value: Any) -> str:
    """Format a value for a message, shortened if it is long or deeply nested."""
    text = _quote.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


class UserError(ValueError):
    """A mistake in the user's input, reported in one line: what, where, and what to do about it.

    Commands print the message to stderr and exit with code 2, without a traceback. Any other
    exception that escapes is a bug of this project.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """The type and the whole message of an exception, shortened, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for the end of a message: the known name closest to a mistyped one, else all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def names_in(text: str, known: Iterable[str], option: str) -> list[str]:
    """The names in a comma-separated list, each once; UserError if one is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown name {name!r}; {nearest(name, known)}")
    return names


def flag(name: str) -> str:
    """The command-line spelling of a setting, for messages."""
    return "--" + name.replace("_", "-")


def last_line(stderr: str) -> str:
    """The last line that a command wrote to stderr, which says why it failed."""
    return (stderr.strip().splitlines() or ["no message"])[-1]


_hints: list[str] = []


def add_hint(text: str | None) -> None:
    """Queue a hint, deduplicated, to print if the command succeeds. None is ignored."""
    if text is not None and text not in _hints:
        _hints.append(text)


def drop_hints() -> None:
    """Discard queued hints, for example those of an earlier command in this process."""
    _hints.clear()


def print_hints() -> None:
    """Print the queued hints to stderr."""
    for text in _hints:
        print(text, file=sys.stderr)
    drop_hints()
