"""What every command shares: flags from dataclasses, errors as one line, exit codes."""

import contextlib
import difflib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from mlx_mla import hints
from mlx_mla.errors import UserError
from mlx_mla.output import Output, shortened
from mlx_mla.text import encodable

# What libraries have to say is not for the readers of our lines; whoever wants it sets these.
for _library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")

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


def run(
    main: Callable[[Sequence[str]], int],
    argv: Sequence[str] | None = None,
    *,
    needs_reader: bool = True,
) -> int:
    """Run a command's body and turn what it raises into the documented exit codes.

    Hints that the body has added (`mlx_mla.hints`) are printed once it has succeeded, and only
    then.

    Args:
        main: The body; gets the arguments.
        argv: The arguments; None: those of the process.
        needs_reader: Whether the command ends once nobody reads its output. Training goes on.

    Returns:
        0 done; 2 the user's input was wrong or the system refused a file, told in one line on
        stderr; 130 stopped by Ctrl-C. A fault of ours escapes as a traceback, which Python ends
        with 1.
    """
    hints.drop()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see mlx_mla/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = sys.argv[1:] if argv is None else argv
    with _streams(needs_reader):
        try:
            _check_text(argv)
            code = main(argv)
            sys.stdout.flush()
            if code == 0:
                hints.say()
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
            problem = f"{_escaped(e.object)} is not text in UTF-8; give files names in UTF-8"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        print(shortened(f"error: {problem}", argv), file=sys.stderr)
        return EXIT_USER


@contextlib.contextmanager
def _streams(needs_reader: bool) -> Iterator[None]:
    """Print what a terminal lacks as escapes, and libraries' warnings not at all."""
    out = Output(sys.stdout, "standard output", go_on=not needs_reader)
    err = Output(sys.stderr, "standard error", go_on=True)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        if not sys.warnoptions:  # -W and PYTHONWARNINGS ask for them
            warnings.simplefilter("ignore")
        yield


def _check_text(argv: Sequence[str]) -> None:
    """Refuse arguments that are no text: neither a tokenizer nor a settings file takes their
    bytes."""
    for argument in argv:
        if not encodable(argument):
            raise UserError(
                f"the argument {_escaped(argument)} is not text in UTF-8; "
                "encode it anew, or give the file a name in UTF-8"
            )


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _known_flags(command: type, prog: str, default: object) -> list[str]:
    extra: dict[str, Any] = {} if default is None else {"default": default}
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.suppress(SystemExit):
        tyro.cli(command, args=["--help"], prog=prog, **extra)
    # Options begin their rows; their descriptions, which may name others' options, are indented.
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
