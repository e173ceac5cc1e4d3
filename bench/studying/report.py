"""A study's report.md."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench.studying.agenda import best_run
from bench.studying.intervals import Interval
from bench.studying.plan import Cell, Study
from bench.studying.results import Record, Results
from bench.studying.search import Search
from bench.studying.summary import Row, Step


def markdown(
    study: Study,
    results: Results,
    rows: Sequence[Row],
    steps: Mapping[str, Sequence[Step]],
    pictures: Mapping[str, str],
    command: str,
) -> str:
    """The whole report.

    Args:
        rows: Of every cell.
        steps: Headings to comparisons of arms with one another.
        pictures: Captions to file names.
        command: What made it.
    """
    lines = [f"# {study.title}", "", *_head(study, results, rows, command), ""]
    for size, tokens in dict.fromkeys((r.cell.size, r.cell.tokens) for r in rows):
        here = [r for r in rows if (r.cell.size, r.cell.tokens) == (size, tokens)]
        lines += [f"## {size}: {here[0].cell.tokens:,} tokens", ""]
        lines += [*_losses(study, here), "", *_costs(here, results), ""]
    for heading, compared in steps.items():
        lines += _steps(heading, compared)
    lines += _evaluations(study, results)
    if pictures:
        lines += ["## Pictures", ""]
        for caption, name in pictures.items():
            lines += [f"![{caption}]({name})", ""]
    lines += ["## What each arm changes", "", *_changes(study, rows), ""]
    lines += ["## Learning rates", "", *_rates(rows), ""]
    if any(row.cell.tunes_scale for row in rows):
        lines += ["## The scale of the first weights, at the rate found", "", *_scales(rows), ""]
    lines += _apart(study, results)
    return "\n".join(lines).rstrip() + "\n"


def rule(study: Study) -> str:
    """The verdict's rule in a sentence."""
    share = math.expm1(study.margin)
    return (
        f"an arm is *better* if the {study.confidence:.0%} interval of its paired difference from "
        f"{study.baseline} lies below zero, *not worse* if its upper end is at most {share:.2%} of "
        f"perplexity ({study.margin:.5f} nats), *worse* if the interval lies above zero and "
        "reaches beyond that margin, else *not shown*"
    )


def _head(study: Study, results: Results, rows: Sequence[Row], command: str) -> list[str]:
    unfinished = [r for r in rows if r.verdict == "unfinished" or (not r.finals)]
    used = {record["machine"] for r in rows for record in r.finals.values()}
    lines = [f"- command: `{command}`"]
    if study.quick:
        lines.append("- **--quick**: a check that everything runs; its figures mean nothing")
    if unfinished:
        lines.append(f"- **not finished**: {len(unfinished)} of {len(rows)} rows")
    lines += [f"- rule, fixed in the study's file: {rule(study)}"]
    lines.append(
        "- intervals are Student's over seeds; at a seed all arms see the same data in the same "
        "order and the same held-out windows; losses are nats a token"
    )
    for name, facts in results.machines.items():
        if name in used:
            lines.append(f"- {name}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for row in rows:
        for seed in row.diverged:
            record = row.finals[seed]
            lines.append(f"- **{_name(row.cell)}, seed {seed}**: {record['diverged']}")
    return lines


def _losses(study: Study, rows: Sequence[Row]) -> list[str]:
    scaled = any(row.cell.tunes_scale for row in rows)
    head = ["arm", "rate", *(["scale"] if scaled else []), "seeds", "loss", "difference"]
    head += ["in perplexity", "verdict", "tokens to the baseline's loss"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=_by_difference):
        d = row.difference
        reached = "-" if row.cell.arm == study.baseline or row.loss is None else "never"
        if row.tokens_to_baseline is not None and row.cell.arm != study.baseline:
            reached = f"{row.tokens_to_baseline / row.cell.tokens:.0%}"
        cells = [
            row.cell.arm,
            _found(row.tuning.rate),
            *([_found(row.tuning.scale)] if scaled else []),
            f"{len(row.finals)}" + (f" ({len(row.diverged)} diverged)" if row.diverged else ""),
            _interval(row.loss, "{:.4f}"),
            _interval(d, "{:+.4f}"),
            "-" if d is None else f"{math.expm1(d.mean):+.2%}",
            row.verdict,
            reached,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by_difference(row: Row) -> float:
    """Best first; the seeds of two arms may differ, so their mean losses do not tell."""
    if row.verdict == "baseline":
        return 0.0
    return math.inf if row.difference is None else row.difference.mean


def _costs(rows: Sequence[Row], results: Results) -> list[str]:
    decoded = {r["key"]: r for r in results.measured.get("decode", [])}
    with_decode = any(r.cell.key in decoded for r in rows)
    head = ["arm", "parameters", "non-embedding", "forward FLOPs a token", "cache bytes a token"]
    head += ["decoding tok/s at 1000 tokens", "cache bytes at 1000 tokens"] if with_decode else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [
            row.cell.arm, f"{row.parameters:,}", f"{row.non_embedding:,}",
            f"{row.flops_per_token:,}", f"{row.cache_bytes:,}",
        ]  # fmt: skip
        if with_decode:
            cells += _decoded(row, decoded.get(row.cell.key))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _decoded(row: Row, d: Record | None) -> list[str]:
    if d is None:
        return ["-", "-"]
    # The cache that was chosen, where there is a choice.
    kept = f" ({d['cache']})" if row.cell.config.model.kind.latent_widths else ""
    return [
        f"{d['tokens_per_second']:,.0f} ({d['min']:,.0f} - {d['max']:,.0f})",
        f"{d['cache_bytes']:,}{kept}",
    ]


def _steps(heading: str, steps: Sequence[Step]) -> list[str]:
    if not steps:
        return []
    lines = [f"## {heading}", ""]
    lines += ["| size, tokens | from | to | difference | in perplexity |", "|---|---|---|---|---|"]
    for step in steps:
        d = step.difference
        lines.append(
            f"| {step.after.size}, {step.after.tokens:,} | {step.before.arm} | {step.after.arm} | "
            f"{_interval(d, '{:+.4f}')} | {'-' if d is None else f'{math.expm1(d.mean):+.2%}'} |"
        )
    return [*lines, ""]


def _evaluations(study: Study, results: Results) -> list[str]:
    best = (best_run(study, results, cell) for cell in study.cells)
    asked = {run.key for run in best if run is not None}
    measured = [r for r in results.measured.get("evaluate", []) if r["key"] in asked]
    if not measured:
        return []
    lines = ["## Tasks", "", "| run | task | metric | value | standard error |"]
    lines.append("|---|---|---|---|---|")
    for row in measured:
        for task, values in row["tasks"].items():
            for name, value in values.items():
                if f"{name}_stderr" in values:
                    error = values[f"{name}_stderr"]
                    lines.append(f"| {row['run']} | {task} | {name} | {value:.4g} | {error:.2g} |")
    return [*lines, ""]


def _changes(study: Study, rows: Sequence[Row]) -> list[str]:
    """Every difference of every arm from the base, also those that defaults bring along."""
    lines = []
    for row in rows:
        cell = row.cell
        if any(c.tokens < cell.tokens and _same(c, cell) for c in study.cells):
            continue  # another budget of the same
        changes = [f"`{k}` {_value(a)} -> {_value(b)}" for k, (a, b) in _diff(study, cell)]
        about = f" ({study.arms[cell.arm]})" if study.arms[cell.arm] else ""
        what = "; ".join(changes) or "nothing"
        lines.append(f"- {cell.arm}{about} at {cell.size}: {what}")
    return lines


def _same(a: Cell, b: Cell) -> bool:
    return (a.arm, a.size) == (b.arm, b.size)


def _diff(study: Study, cell: Cell) -> list[tuple[str, tuple[Any, Any]]]:
    return sorted(study.differences(cell).items())


def _value(value: Any) -> str:
    return "unset" if value is None else str(value)


def _rates(rows: Sequence[Row]) -> list[str]:
    return _tuned("rates", [(row.cell, row.tuning.rate) for row in rows])


def _scales(rows: Sequence[Row]) -> list[str]:
    there = [row for row in rows if row.cell.tunes_scale]
    return _tuned("scales", [(row.cell, row.tuning.scale) for row in there])


def _tuned(what: str, found: Sequence[tuple[Cell, Search | None]]) -> list[str]:
    """A row for every arm: what was tried, and what came of it."""
    lines = [
        f"| arm | size, tokens | {what} tried (loss) | {what.removesuffix('s')} | how |",
        "|---|---|---|---|---|",
    ]
    for cell, search in found:
        losses = search.losses if search else {}
        tried = ", ".join(
            f"{value:g} ({loss:.4f})" if math.isfinite(loss) else f"{value:g} (diverged)"
            for value, loss in losses.items()
        )
        tuned = cell.tune_steps * cell.config.step_tokens
        with_ = "" if tuned == cell.tokens else f", with {tuned:,} tokens"
        note = search.note if search else ""
        lines.append(
            f"| {cell.arm} | {cell.size}, {cell.tokens:,} | {tried or '-'} | {_found(search)} | "
            f"{note or 'unfinished'}{with_} |"
        )
    return lines


def _found(search: Search | None) -> str:
    return "-" if search is None or search.best is None else f"{search.best:g}"


def _apart(study: Study, results: Results) -> list[str]:
    others = results.others(study)
    if not others:
        return []
    lines = ["## Finished runs that the study no longer asks for", ""]
    lines.append("They are kept in results.json and count for nothing above.")
    lines.append("")
    for r in others:
        loss = "diverged" if r["loss"] is None else f"loss {r['loss']:.4f}"
        lines.append(f"- {_record_name(r)}: {loss}")
    return [*lines, ""]


def _record_name(record: Record) -> str:
    """The name of a finished run."""
    return "{arm}/{size}/{tokens}/{rate:g}-{seed}".format(**record)


def _name(cell: Cell) -> str:
    return f"{cell.arm} at {cell.size}, {cell.tokens:,} tokens"


def _interval(value: Interval | None, form: str) -> str:
    if value is None:
        return "-"
    mean = form.format(value.mean)
    if value.count == 1:
        return mean
    return f"{mean} ({form.format(value.low)} to {form.format(value.high)})"
