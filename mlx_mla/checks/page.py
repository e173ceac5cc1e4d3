"""Two pages in Markdown: the report of a check, and what has not run on Apple silicon."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mla.checks.rows import ROWS

FORM = "I ran it on a Mac"

BY_HAND = (
    (
        "A ring over Thunderbolt, host file by `mlx.distributed_config`",
        "`mlx_mla/backends/mlx/ranks.py`",
        "two Macs, as in [distributed.md](distributed.md#several-macs): `mlx.launch --hostfile "
        "macs.json --backend ring -- python -m mlx_mla.train --steps 50 --log-every 1 --out "
        "runs/ring`, and the same without `mlx.launch --out runs/one`; then kill one Mac's process",
        'the losses of both `metrics.jsonl` agree to 1e-4; the other rank ends with "has lost '
        'another rank"',
    ),
    (
        "RDMA over Thunderbolt 5 (jaccl)",
        "the same; `MLXEngine.is_loss` guesses the start of jaccl's error messages",
        "the same with `--backend jaccl`",
        "the same; if a lost rank shows a traceback or hangs, please report it",
    ),
    (
        "What averaging costs over Thunderbolt",
        "`bench/reduction.py`",
        "`mlx.launch --hostfile macs.json -- python -m bench reduction --preset mla-124m "
        "--grad-accum-steps 8`",
        "two kinds of steps side by side",
    ),
    (
        "`make` with the GNU make 3.81 of the Xcode tools",
        "`Makefile`",
        "`make train`",
        "as on Linux",
    ),
)
"""What one command on one machine cannot check: (what, where, how, expected)."""

UNTESTED = """\
# Not yet run on Apple silicon

Everything here is written from documented API and checked on Linux; nobody has run it on a Mac yet.
No figure in this repository was measured on a Mac.

    make setup
    .venv/bin/python -m mlx_mla.doctor --check

runs every row of the first table that this machine supports. It takes minutes, continues after a
failure, and writes `runs/check/check.md`. Please send that file with the form "{form}",
whatever the result says.

{table}

On Linux it runs the rows that need no Mac, and CUDA's where there is such a GPU.

Not in it, since one command on one Mac cannot check it:

{by_hand}
"""


def report(facts: Mapping[str, str], to_fix: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """check.md.

    Args:
        rows: As check.json has them.
    """
    count = Counter(row["status"] for row in rows)
    machine = "\n".join(f"{key:<24}{value}" for key, value in facts.items())
    advice = "".join(f"\n- to fix: {item}" for item in to_fix)
    table = _table(
        ("row", "", "figure", "expected", "s"),
        [(r["name"], r["status"], r["figure"], r["expected"], f"{r['seconds']:.0f}") for r in rows],
    )
    return (
        "# `python -m mlx_mla.doctor --check`\n\n"
        f"{count['pass']} passed, {count['fail']} failed, {count['skip']} skipped\n\n"
        f"```\n{machine}\n```\n{advice}\n{table}\n"
    )


def untested() -> str:
    """docs/untested-on-apple.md."""
    here = [row for row in ROWS if "cuda" not in row.needs]
    table = _table(
        ("row", "what", "where", "expected"),
        [(f"`{r.name}`", r.what, ", ".join(map(_place, r.where)), r.expected) for r in here],
    )
    return UNTESTED.format(
        form=FORM,
        table=table,
        by_hand=_table(("what", "where", "how to check on a Mac", "expected"), BY_HAND),
    )


def _place(where: str) -> str:
    file, _, symbol = where.partition(":")
    return f"`{symbol}` in `{file}`" if symbol else f"`{file}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
