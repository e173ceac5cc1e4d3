"""`python -m bench NAME`: run a benchmark, or write a stored report again."""

import importlib
import sys
from collections.abc import Sequence

from bench import harness
from mlx_mla import cli
from mlx_mla.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name == "report":
        return harness.report(rest)
    if name == "reduction":  # prints a table on one rank, and stores nothing
        code: int = importlib.import_module("bench.reduction").run(rest)
        return code
    if name in harness.REGISTRY:
        return harness.run(harness.find(name), rest)
    if name not in ("-h", "--help"):
        raise UserError(f"no benchmark {name!r}; take one of {', '.join(harness.REGISTRY)}")
    print("usage: python -m bench NAME [flags]; python -m bench NAME --help lists the flags\n")
    for name, (_, subject) in harness.REGISTRY.items():
        print(f"  {name:<12}{subject}")
    print(f"  {'report':<12}the reports and the pictures of stored results, written again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
