"""What every command shares: flags from dataclasses, errors as one line, exit codes."""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from mlx_mla import hints
from mlx_mla.errors import UserError

T = TypeVar("T")

EXIT_FAULT, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def parse(command: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Parse flags into a dataclass.

    Args:
        command: The dataclass; its docstrings are the help.
        argv: Arguments without the program's name.
        prog: What to call the program in help.
        default: Values of flags that are not given.

    Raises:
        UserError: For a wrong value or an unknown flag, naming the nearest known one.
    """
    extra: dict[str, Any] = {} if default is None else {"default": default}
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            result, unknown = tyro.cli(
                command, args=list(argv), prog=prog, return_unknown_args=True, **extra
            )
    except SystemExit as e:
        if e.code in (0, None):
            raise
        raise UserError(f"{_one_line(stderr.getvalue())}; see {prog} --help") from None
    if unknown:
        name = unknown[0].split("=")[0].replace("_", "-")
        close = difflib.get_close_matches(name, _known_flags(command, prog, default), 1, 0.5)
        hint = f"did you mean {close[0]}?" if close else f"see {prog} --help"
        raise UserError(f"unknown argument {unknown[0]!r}; {hint}")
    return result


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's body and turn what it raises into the documented exit codes.

    Hints that the body has added (`mlx_mla.hints`) are printed once it has succeeded, and only
    then.

    Returns:
        0 done; 2 the user's input was wrong, told in one line on stderr; 130 stopped by Ctrl-C. A
        fault of ours escapes as a traceback, which Python ends with 1.
    """
    hints.drop()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see mlx_mla/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(sys.argv[1:] if argv is None else argv)
        if code == 0:
            hints.say()
        return code
    except UserError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return EXIT_USER
    except BrokenPipeError:
        # The reader of our output (head, less) has gone, which is no error; Python must not flush
        # to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _known_flags(command: type, prog: str, default: object) -> list[str]:
    extra: dict[str, Any] = {} if default is None else {"default": default}
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=prog, **extra)
    return sorted(set(re.findall(r"--[a-z0-9][a-z0-9-]*", stdout.getvalue())))


def _one_line(box: str) -> str:
    """The message in the box that tyro draws around an error: what stands before its first rule."""
    text = []
    for raw in box.splitlines():
        line = raw.strip("│╭╮╰╯─ \t")
        if raw.startswith("│") and not line:
            break
        if line and not raw.startswith("╭"):
            text.append(line)
    return " ".join(text).rstrip(".")
