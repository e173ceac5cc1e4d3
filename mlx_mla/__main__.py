"""`mlx-mla COMMAND ...` and `python -m mlx_mla COMMAND ...`: every command by its name."""

import importlib
import sys
from collections.abc import Sequence

from mlx_mla import cli
from mlx_mla.errors import UserError, nearest

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "generate text",
    "evaluate": "score models on WikiText-2, LAMBADA and HellaSwag",
    "convert": "import a checkpoint, convert it to MLA, or export it",
    "prepare": "turn text into shards of token ids",
    "plot": "compare runs",
    "serve": "serve a model over HTTP",
    "doctor": "show what this machine offers and what to fix",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        # Only the command's own module, since some import much.
        name = "convert.__main__" if argv[0] == "convert" else argv[0]
        command = importlib.import_module(f"mlx_mla.{name}")
        # A command with threads, `serve`, ends the process itself.
        code: int = getattr(command, "process", command.main)(argv[1:])
        return code
    return cli.run(_help, argv)


def _help(argv: Sequence[str]) -> int:
    if argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"unknown command {argv[0]!r}; {nearest(argv[0], COMMANDS)}")
    print("usage: mlx-mla COMMAND [flags]; each command explains its flags with --help\n")
    for name, purpose in COMMANDS.items():
        print(f"  {name:<10}{purpose}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
