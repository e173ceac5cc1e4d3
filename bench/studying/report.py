"""A study's report.md."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.studying.intervals import Interval
from bench.studying.plan import Cell, Study
from bench.studying.results import Record, Results
from bench.studying.search import Search
from bench.studying.summary import Comparison, Row, Summary
from mlx_mla.display import markdown_table


def markdown(
    study: Study, results: Results, summary: Summary, pictures: Mapping[str, str], command: str
) -> str:
    """The whole report.

    Args:
        pictures: Captions to file names.
        command: The command that made it.
    """
    rows = summary.rows
    lines = [f"# {study.title}", "", *_head(study, results, summary, command), ""]
    if study.primary is not None:
        lines += ["## The primary comparison", "", *_primary(study, summary.primary), ""]
    for place in study.places:
        here = [r for r in rows if r.cell.place == place]
        lines += [f"## {place[0]}: {place[1]:,} tokens", ""]
        lines += [*_losses(study, here), "", *_costs(here), ""]
    if summary.pairs:
        lines += ["## Pairs of arms, the second against the first", "", *_pairs(summary.pairs), ""]
    if pictures:
        lines += ["## Pictures", ""]
        for caption, name in pictures.items():
            lines += [f"![{caption}]({name})", ""]
    lines += ["## What each arm changes", "", *_changes(study), ""]
    lines += ["## Tuning", "", *_tuned(rows), ""]
    if others := results.others(study):
        lines += ["## Finished runs that the study does not ask for", ""]
        lines += ["They are kept in results.json and count for nothing above.", ""]
        lines += [f"- {r.name}: {_outcome(r)}" for r in others]
    return "\n".join(lines).rstrip() + "\n"


def rule(study: Study) -> str:
    """The rule of the verdicts, in a sentence."""
    share = math.expm1(study.margin)
    return (
        f"an arm is *better* if the {study.confidence:.0%} interval of its paired difference lies "
        f"below zero, *not worse* if its upper end is at most {share:.2%} of perplexity "
        f"({study.margin:.5f} nats), *worse* if the interval lies above zero and reaches beyond "
        "that margin, otherwise *not shown*"
    )


def _head(study: Study, results: Results, summary: Summary, command: str) -> list[str]:
    rows = summary.rows
    unfinished = [r for r in rows if not r.finished or r.verdict.startswith("unfinished")]
    used = {record.machine for r in rows for record in r.finals.values()}
    lines = [f"- command: `{command}`"]
    if study.quick:
        lines.append("- **--quick**: a check that everything runs; its figures mean nothing")
    if unfinished:
        lines.append(f"- **not finished**: {len(unfinished)} of {len(rows)} rows")
    tested = sum(c.holm is not None for c in (*(r.comparison for r in rows), *summary.pairs) if c)
    primary = "none was declared primary" if study.primary is None else "all but the primary one"
    lines += [
        f"- rule, fixed in the study's file: {rule(study)}",
        "- losses are held-out, in nats a token; at a seed all arms see the same data in the same "
        "order and the same held-out windows, so differences are paired by seed; an arm's loss is "
        f"{study.baseline}'s mean over its seeds plus the arm's paired difference",
        "- intervals are Student's with the standard deviation of the arm's own differences; those "
        "with the standard deviation pooled over all arms of the table stand beside them, and a "
        "verdict with * is not confirmed by them",
        f"- exploratory comparisons: {tested} ({primary}); Holm's p is adjusted for their number",
    ]
    if any(cell.tuning_seed is None for cell in study.cells):
        lines.append(
            "- **tuning used the first seed of the results**, since the study's file has no "
            "tuning_seed; seeds marked t are the tuning run itself"
        )
    for name, facts in results.machines.items():
        if name in used:
            lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for row in rows:
        for seed in row.diverged:
            where = f"{row.cell.arm} at {row.cell.size}, {row.cell.tokens:,} tokens, seed {seed}"
            lines.append(f"- **{where}**: {row.finals[seed].diverged}")
    return lines


def _primary(study: Study, c: Comparison | None) -> list[str]:
    assert study.primary is not None
    arms, rival = study.primary
    what = arms[0] if len(arms) == 1 else f"the arm of {', '.join(arms)} with the best tuning loss"
    said = f"Declared in the study's file: {what}, against {rival}."
    if c is None:
        return [said, "", "Tuning has not ended, so the arm is not known."]
    return [said, "", *_pairs([c])]


def _losses(study: Study, rows: Sequence[Row]) -> list[str]:
    with_std = any(row.cell.tunes_std for row in rows)
    head = ["arm", "rate", *(["std"] if with_std else []), "seeds", "loss", "difference"]
    head += ["in perplexity", "with pooled SD", "Holm's p", "verdict"]
    cells = []
    for row in sorted(rows, key=_by_difference):
        tuning, c = row.tuning, row.comparison
        std = tuning.std.best if tuning.std else None
        cells.append(
            [
                row.cell.arm,
                _number(tuning.best_rate),
                *([_number(std)] if with_std else []),
                _seeds(row),
                "-" if row.loss is None else f"{row.loss:.4f}",
                *_differences(c),
                f"{row.verdict}{'' if c is None or c.agrees else '*'}",
            ]
        )
    return markdown_table(head, cells)


def _pairs(comparisons: Sequence[Comparison]) -> list[str]:
    head = ["size, tokens", "from", "to", "seeds", "difference", "in perplexity"]
    head += ["with pooled SD", "Holm's p", "verdict"]
    cells = [
        [
            f"{c.arm.size}, {c.arm.tokens:,}",
            c.rival.arm,
            c.arm.arm,
            str(len(c.values)),
            *_differences(c),
            f"{c.verdict}{'' if c.agrees else '*'}",
        ]
        for c in comparisons
    ]
    return markdown_table(head, cells)


def _differences(c: Comparison | None) -> list[str]:
    """Difference, the same in perplexity, with the pooled SD, and the adjusted p value."""
    if c is None or c.difference is None:
        return ["-"] * 4
    p = "primary" if c.primary else "-" if c.holm is None else f"{c.holm:.3f}"
    pooled = "-" if c.with_pooled_sd is None else _percent(c.with_pooled_sd)
    return [f"{c.difference.mean:+.4f}", _percent(c.difference), pooled, p]


def _percent(d: Interval) -> str:
    low, mean, high = (f"{100 * math.expm1(v):+.2f}" for v in (d.low, d.mean, min(d.high, 700.0)))
    return f"{mean} %" if math.isinf(d.high) else f"{mean} % ({low} to {high})"


def _seeds(row: Row) -> str:
    """Seeds that are done, of how many, and those whose run is a tuning run."""
    done = ", ".join(f"{s}t" if s in row.tuned_on else str(s) for s in sorted(row.finals))
    missing = "" if row.finished else f" of {len(row.cell.seeds)} seeds"
    diverged = f" ({len(row.diverged)} diverged)" if row.diverged else ""
    return (done or "none") + missing + diverged


def _by_difference(row: Row) -> float:
    if row.comparison is None:
        return 0.0
    return math.inf if row.difference is None else row.difference.mean


def _costs(rows: Sequence[Row]) -> list[str]:
    head = ["arm", "parameters", "non-embedding", "forward FLOPs a token", "cache bytes a token"]
    head += ["training tok/s", "minutes a run", "tokens to the baseline's loss"]
    cells = []
    for row in rows:
        speeds = [r.tokens_per_second for r in row.finals.values() if r.tokens_per_second]
        seconds = [r.seconds for r in row.finals.values() if r.loss is not None]
        machines = sorted({r.machine for r in row.finals.values()})
        reached = "never" if row.tokens_to_baseline is None else ""
        reached = reached or f"{row.tokens_to_baseline / row.cell.tokens:.0%}"  # type: ignore[operator]
        cells.append(
            [
                row.cell.arm,
                f"{row.parameters:,}",
                f"{row.non_embedding:,}",
                f"{row.flops_per_token:,}",
                f"{row.cache_bytes:,}",
                f"{statistics.median(speeds):,.0f} ({', '.join(machines)})" if speeds else "-",
                f"{statistics.median(seconds) / 60:.1f}" if seconds else "-",
                "-" if row.comparison is None or not row.finals else reached,
            ]
        )
    return markdown_table(head, cells)


def _changes(study: Study) -> list[str]:
    """Every difference of every arm from the base, including those that defaults bring along."""
    lines, seen = [], set[tuple[str, str]]()
    for cell in study.cells:
        if (cell.arm, cell.size) in seen:
            continue  # another budget
        seen.add((cell.arm, cell.size))
        changes = [
            f"`{k}` {_value(a)} -> {_value(b)}"
            for k, (a, b) in sorted(study.differences(cell).items())
        ]
        about = f" ({study.arms[cell.arm]})" if study.arms[cell.arm] else ""
        lines.append(f"- {cell.arm}{about} at {cell.size}: {'; '.join(changes) or 'nothing'}")
    return lines


def _value(value: Any) -> str:
    return "unset" if value is None else str(value)


def _tuned(rows: Sequence[Row]) -> list[str]:
    """A line for every search: what was tried, and the result."""
    cells = []
    for row in rows:
        cell, tuning = row.cell, row.tuning
        searches = [("rate", tuning.rate)]
        if tuning.std is not None and cell.tunes_std:
            searches.append(("std", tuning.std))
        if tuning.rate_again is not None:
            searches.append(("rate again", tuning.rate_again))
        for what, search in searches:
            cells.append([cell.arm, f"{cell.size}, {cell.tokens:,}", what, *_search(cell, search)])
    return markdown_table(["arm", "size, tokens", "what", "tried (loss)", "found", "how"], cells)


def _search(cell: Cell, search: Search) -> list[str]:
    tried = ", ".join(
        f"{value:g} ({loss:.4f})" if math.isfinite(loss) else f"{value:g} (diverged)"
        for value, loss in search.losses.items()
    )
    tuned = cell.tune_steps * cell.config.step_tokens
    with_ = "" if tuned == cell.tokens else f", with {tuned:,} tokens"
    return [tried or "-", _number(search.best), (search.note or "unfinished") + with_]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _outcome(r: Record) -> str:
    return "diverged" if r.loss is None else f"loss {r.loss:.4f}"
