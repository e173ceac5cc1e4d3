"""What a command prints, on whatever it is printed: terminals without the characters, readers that
go away, full disks; and lines that stay short."""

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Optional, TextIO, cast

from mlx_mla.errors import UserError

LONGEST_LINE = 200
"""Characters of an error line that repeats long input."""
LONG_INPUT, SHOWN_INPUT = 160, 60


class Output:
    """A text stream that writes what its encoding lacks as escapes, and knows what to do when it
    cannot write.

    Args:
        stream: What is written to. None (a process started without the stream): nothing.
        name: What to call it in errors.
        go_on: Whether the command goes on, without a word more, once the stream cannot be written.
            Otherwise a reader that has gone raises BrokenPipeError, and all else a UserError.
    """

    def __init__(self, stream: Optional[TextIO], name: str, go_on: bool):
        self._stream, self._name, self._go_on = stream, name, go_on
        with contextlib.suppress(AttributeError, ValueError):
            cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._failures():
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failures():
            if self._stream is not None:
                self._stream.flush()

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self._silence()
            if isinstance(e, BrokenPipeError) and not self._go_on:
                raise
            if not self._go_on:
                raise UserError(
                    f"{self._name} cannot be written: {e.strerror}; give it another place"
                ) from None

    def _silence(self) -> None:
        """Send what is left, and what Python flushes at its end, nowhere."""
        assert self._stream is not None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def shortened(text: str, inputs: Sequence[str] = (), longest: int = LONGEST_LINE) -> str:
    """A line without line breaks that shows the ends alone of long input, so that its own words
    can be read.

    Args:
        inputs: What the user has given, which the line may repeat. A word longer than any path is
            taken for input, too.
        longest: Characters of a line that repeats long input. Its remedy, after the last
            semicolon, stays whole where it can.
    """
    line = " ".join(text.split())
    whole = line
    for value in sorted({" ".join(i.split()) for i in inputs}, key=len, reverse=True):
        if len(value) > LONG_INPUT:
            line = line.replace(value, _ends(value, SHOWN_INPUT))
    line = re.sub(rf"\S{{{LONG_INPUT + 1},}}", lambda m: _ends(m[0], SHOWN_INPUT), line)
    if len(line) <= longest or (line == whole and len(line) <= 5 * longest):
        return line
    before, semicolon, remedy = line.rpartition("; ")
    if semicolon and len(remedy) <= longest // 2:
        return f"{_ends(before, longest - len(remedy) - 2)}; {remedy}"
    return _ends(line, longest)


def _ends(text: str, length: int) -> str:
    """The beginning and the end of a text, `length` characters in all."""
    if len(text) <= length:
        return text
    end = (length - 3) // 3
    return f"{text[: length - 3 - end]}...{text[-end:]}"
