"""What every command shares: flags from dataclasses, errors as one line, exit codes."""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional, TextIO, TypedDict, TypeVar, cast

import tyro
from tyro.conf import OmitArgPrefixes

from mlx_mla.errors import UserError, drop_hints, print_hints
from mlx_mla.files import encodable

# Silence the log messages of libraries. Setting these variables turns them back on.
for _library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

T = TypeVar("T")

EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def parse(command: type[T], argv: Sequence[str], prog: str, about: str | None = None) -> T:
    """Parse flags into a dataclass.

    Args:
        command: The dataclass; its docstrings are the help.
        about: The first lines of --help. None: the dataclass's docstring.

    Raises:
        UserError: For a wrong value or an unknown flag, naming the nearest known one.
    """
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            result, unknown = tyro.cli(
                command, args=list(argv), prog=prog, description=about, return_unknown_args=True
            )
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise UserError(f"{_one_line(stderr.getvalue())}; see {prog} --help") from None
    if unknown:
        name = unknown[0].split("=")[0].replace("_", "-")
        close = difflib.get_close_matches(name, _known_flags(command, prog), 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"see {prog} --help"
        raise UserError(f"unknown argument {unknown[0]!r}; {hint}")
    return result


def given(
    groups: Mapping[str, Mapping[str, Any]], argv: Sequence[str], prog: str, about: str
) -> dict[str, Any]:
    """The values of the flags that are in argv, and of no others, by name.

    Args:
        groups: Types of the flags by name, annotated with their help (`tyro.conf.arg`), in the
            groups in which --help shows them.
        about: The first lines of --help.

    Raises:
        UserError: As `parse` does.
    """
    table: Any = TypedDict  # mypy knows it with literal keys only
    unprefixed: Any = OmitArgPrefixes
    # With total=False, what is not given stays out.
    types = {title: unprefixed[table(title, flags, total=False)] for title, flags in groups.items()}
    found = parse(table("Flags", types), argv, prog, about)
    return {name: value for values in found.values() for name, value in values.items()}


def run(
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None = None,
    *,
    needs_reader: bool = True,
) -> int:
    """Run a command's body, and turn the exceptions that it raises into the documented exit codes.

    Hints that the body has added (`add_hint`) are printed only if it succeeds.

    Args:
        main: The body, which is called with the arguments.
        argv: The arguments. None: those of the process.
        needs_reader: True if the command ends once nobody reads its output. Training and preparing
            continue.

    Returns:
        0 done; 2 the user's input was wrong or the system refused a file, reported in one line on
        stderr; 130 stopped by Ctrl-C. A bug escapes as a traceback, which Python ends with 1.
    """
    drop_hints()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # see mlx_mla/__init__.py
    argv = sys.argv[1:] if argv is None else argv
    with _streams(needs_reader):
        try:
            _check_text(argv)
            code = main(argv)
            sys.stdout.flush()
            if code == 0:
                print_hints()
            return code
        except BrokenPipeError:
            return 0  # the reader of our output (head, less) has gone, which is no error
        except UserError as e:
            problem = str(e)
        except OSError as e:
            if e.errno is None:
                raise
            where = "" if e.filename is None else f"{e.filename}: "
            problem = f"{where}{e.strerror or e}"
        except UnicodeEncodeError as e:
            if encodable(e.object):
                raise
            problem = f"{_escaped(e.object)} is not valid UTF-8; rename the file"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        print(shortened(f"error: {problem}", argv), file=sys.stderr)
        return EXIT_USER


@contextlib.contextmanager
def _streams(needs_reader: bool) -> Iterator[None]:
    """Escape characters that the terminal cannot show, and hide the warnings of libraries."""
    out = Output(sys.stdout, "standard output", may_fail=not needs_reader)
    err = Output(sys.stderr, "standard error", may_fail=True)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        if not sys.warnoptions:  # -W and PYTHONWARNINGS ask for them
            warnings.simplefilter("ignore")
        yield


def _check_text(argv: Sequence[str]) -> None:
    """Refuse arguments that are not valid UTF-8, which tokenizers and settings files need."""
    for argument in argv:
        if not encodable(argument):
            raise UserError(
                f"the argument {_escaped(argument)} is not valid UTF-8; encode it as UTF-8, or "
                "rename the file"
            )


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _known_flags(command: type, prog: str) -> list[str]:
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=prog)
    # A line that begins with a flag defines it. Flags in descriptions are indented.
    rows = re.findall(r"^[^\w-]{0,2}(-.*?)(?:  |$)", stdout.getvalue(), re.MULTILINE)
    return sorted({flag for row in rows for flag in re.findall(r"--[a-z0-9][a-z0-9-]*", row)})


def _one_line(box: str) -> str:
    """The message in tyro's box, drawn in Unicode or ASCII: between its title and its next rule."""
    text: list[str] = []
    for line in box.splitlines()[1:]:
        if line.strip("│╰╯─- \t"):
            text.append(line.strip("│ \t"))
        elif text:
            break
    return " ".join(text).rstrip(".")


LONGEST_LINE = 200
"""Maximum length of an error line that repeats long input, in characters."""
LONG_INPUT, SHOWN_INPUT = 160, 60


class Output:
    """A text stream that escapes characters outside its encoding, and handles failures to write.

    Args:
        stream: The stream to write to. None (a process started without it): discard the text.
        name: Its name in error messages.
        may_fail: True if the command continues without the stream once that cannot be written.
            Otherwise, a reader that has gone raises BrokenPipeError, and any other failure a
            UserError.
    """

    def __init__(self, stream: Optional[TextIO], name: str, may_fail: bool):
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self._name, self._may_fail = name, may_fail
        with contextlib.suppress(AttributeError, ValueError):
            cast(io.TextIOWrapper, self._stream).reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with self._failures():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failures():
            self._stream.flush()

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self._silence()
            if isinstance(e, BrokenPipeError) and not self._may_fail:
                raise
            if not self._may_fail:
                raise UserError(
                    f"{self._name} cannot be written: {e.strerror}; redirect it elsewhere"
                ) from None

    def _silence(self) -> None:
        """Discard the remaining output, including what Python flushes when it exits."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def shortened(text: str, inputs: Sequence[str] = ()) -> str:
    """Put a message on one line, and shorten the long input that it repeats to its two ends. The
    remedy after its last semicolon stays whole if it fits.

    Args:
        inputs: The user's arguments, which the message may repeat. Any word longer than a path is
            treated as input, too.
    """
    line = " ".join(text.split())
    whole = line
    for value in sorted({" ".join(i.split()) for i in inputs}, key=len, reverse=True):
        if len(value) > LONG_INPUT:
            line = line.replace(value, _ends(value, SHOWN_INPUT))
    line = re.sub(rf"\S{{{LONG_INPUT + 1},}}", lambda m: _ends(m[0], SHOWN_INPUT), line)
    if len(line) <= LONGEST_LINE or (line == whole and len(line) <= 5 * LONGEST_LINE):
        return line
    before, semicolon, remedy = line.rpartition("; ")
    if semicolon and len(remedy) <= LONGEST_LINE // 2:
        return f"{_ends(before, LONGEST_LINE - len(remedy) - 2)}; {remedy}"
    return _ends(line, LONGEST_LINE)


def _ends(text: str, length: int) -> str:
    """The beginning and the end of a text, `length` characters in all."""
    if len(text) <= length:
        return text
    end = (length - 3) // 3
    return f"{text[: length - 3 - end]}...{text[-end:]}"
