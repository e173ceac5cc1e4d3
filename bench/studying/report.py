"""A study's report.md."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.studying.plan import Study
from bench.studying.results import Record, Results
from bench.studying.summary import Comparison, Interval, Row, Summary
from mlx_mla.display import markdown_table
from mlx_mla.model.estimate import cache_bytes_per_token, forward_flops_per_token
from mlx_mla.model.weights import parameter_shapes


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
    lines += _section("The primary comparison", _primary(study, summary.primary))
    for place in study.places:
        here = [r for r in rows if r.cell.place == place]
        tables = [*_losses(here), "", *_costs(here)]
        lines += _section(f"{place[0]}: {place[1]:,} tokens", tables)
    lines += _section("Pairs of arms, the second against the first", _pairs(summary.pairs))
    shown = "\n\n".join(f"![{caption}]({name})" for caption, name in pictures.items())
    lines += _section("Pictures", [shown] if shown else [])
    lines += _section("What each arm changes", _changes(study))
    lines += _section("Tuning", _tuned(rows))
    if others := results.others(study):
        kept = "They are kept in results.json and count for nothing above."
        std = "initializer_range"
        named = [f"- {r.name}, std {r.settings.get(std)}: {_outcome(r)}" for r in others]
        lines += _section("Finished runs that the study does not ask for", [kept, "", *named])
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _head(study: Study, results: Results, summary: Summary, command: str) -> list[str]:
    rows = summary.rows
    unfinished = [r for r in rows if not r.finished or r.verdict.startswith("unfinished")]
    used = {record.machine for r in rows for record in r.finals.values()}
    tried = (results.get(run) for r in rows for run in r.tuning.tried)
    used |= {record.machine for record in tried if record is not None}
    lines = [f"- command: `{command}`"]
    if study.quick:
        lines.append("- **--quick**: a check that everything runs; its figures mean nothing")
    if unfinished:
        lines.append(f"- **not finished**: {len(unfinished)} of {len(rows)} rows")
    primary = "none was declared primary" if study.primary is None else "all but the primary one"
    lines += [
        f"- rule, fixed in the study's file: {_rule(study)}",
        "- losses are held-out, in nats a token; at a seed all arms see the same data in the same "
        "order and the same held-out windows, so differences are paired by seed; an arm's loss is "
        f"{study.baseline}'s mean over its seeds plus the arm's paired difference",
        "- intervals are Student's with the standard deviation of the arm's own differences; those "
        "with the standard deviation pooled over all arms of the table stand beside them, and a "
        "verdict with * is not confirmed by them",
        f'- exploratory comparisons: {summary.exploratory} ({primary}); "Holm\'s p" is the p value '
        "of no difference, adjusted for that number",
    ]
    if any(cell.tunes_on_a_result for cell in study.cells):
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


def _rule(study: Study) -> str:
    """The rule of the verdicts, in a sentence."""
    share, sure = math.expm1(study.margin), f"{100 * study.confidence:g}%"
    return (
        f"an arm is *better* if the {sure} interval of its paired difference lies "
        f"below zero, *not worse* if its upper end is at most {share:.2%} of perplexity "
        f"({study.margin:.5f} nats), *worse* if the interval lies above zero and reaches beyond "
        "that margin, otherwise *not shown*"
    )


def _primary(study: Study, c: Comparison | None) -> list[str]:
    if study.primary is None:
        return []
    arms, rival = study.primary
    what = arms[0] if len(arms) == 1 else f"the arm of {', '.join(arms)} with the best tuning loss"
    said = f"Declared in the study's file: {what}, against {rival}."
    return [said, "", *(_pairs([c]) if c else ["Tuning has not ended, so the arm is not known."])]


COMPARED = ("difference", "in perplexity", "with pooled SD", "Holm's p", "verdict")


def _compared(c: Comparison | None) -> list[str]:
    """The cells of a comparison; the baseline's are empty."""
    if c is None:
        return [*"----", "baseline"]
    said = f"{c.verdict}{'' if c.confirmed else '*'}"
    if c.difference is None:
        return [*"----", said]
    p = "primary" if c.primary else "-" if c.holm is None else f"{c.holm:.3f}"
    pooled = "-" if c.with_pooled_sd is None else _percent(c.with_pooled_sd)
    return [f"{c.difference.mean:+.4f}", _percent(c.difference), pooled, p, said]


def _losses(rows: Sequence[Row]) -> list[str]:
    """Rates, seeds and losses, the best arm first."""

    def order(row: Row) -> float:
        if row.comparison is None:
            return 0.0
        return math.inf if row.difference is None else row.difference.mean

    std = ["std"] if any(row.cell.tunes_std for row in rows) else []
    cells = [
        [
            row.cell.arm,
            _number(row.tuning.rate),
            *(_number(row.tuning.std) for _ in std),
            _seeds(row),
            "-" if row.loss is None else f"{row.loss:.4f}",
            *_compared(row.comparison),
        ]
        for row in sorted(rows, key=order)
    ]
    return markdown_table(["arm", "rate", *std, "seeds", "loss", *COMPARED], cells)


def _pairs(comparisons: Sequence[Comparison]) -> list[str]:
    cells = [
        [f"{c.arm.size}, {c.arm.tokens:,}", c.rival.arm, c.arm.arm, len(c.values), *_compared(c)]
        for c in comparisons
    ]
    return markdown_table(["size, tokens", "from", "to", "seeds", *COMPARED], cells)


def _percent(d: Interval) -> str:
    low, mean, high = (f"{100 * math.expm1(v):+.2f}" for v in (d.low, d.mean, min(d.high, 700.0)))
    return f"{mean} %" if math.isinf(d.high) else f"{mean} % ({low} to {high})"


def _seeds(row: Row) -> str:
    """Seeds that are done, of how many, and those whose run is a tuning run."""
    done = ", ".join(f"{s}t" if s in row.tuned_on else str(s) for s in sorted(row.finals))
    missing = "" if row.finished else f" of {len(row.cell.seeds)} seeds"
    diverged = f" ({len(row.diverged)} diverged)" if row.diverged else ""
    return (done or "none") + missing + diverged


def _costs(rows: Sequence[Row]) -> list[str]:
    head = ["arm", "parameters", "non-embedding", "forward FLOPs a token", "cache bytes a token"]
    head += ["training tok/s", "minutes a run", "tokens to the baseline's loss"]
    cells = []
    for row in rows:
        model, finals = row.cell.config.model, row.finals.values()
        sizes = {name: math.prod(shape) for name, shape in parameter_shapes(model).items()}
        embeddings = sum(n for name, n in sizes.items() if ".wte." in name or ".wpe." in name)
        speeds = [r.tokens_per_second for r in finals if r.tokens_per_second]
        seconds = [r.seconds for r in finals if r.loss is not None]
        tokens, reached = row.tokens_to_baseline, "-"
        if row.comparison is not None and tokens is not None:
            reached = f"{tokens / row.cell.tokens:.0%}" if math.isfinite(tokens) else "never"
        machines = ", ".join(sorted({r.machine for r in finals}))
        cells.append([
            row.cell.arm, f"{sum(sizes.values()):,}", f"{sum(sizes.values()) - embeddings:,}",
            f"{forward_flops_per_token(model, row.cell.config.context):,}",
            f"{cache_bytes_per_token(model, 2):,}",
            f"{statistics.median(speeds):,.0f} ({machines})" if speeds else "-",
            f"{statistics.median(seconds) / 60:.1f}" if seconds else "-", reached,
        ])  # fmt: skip
    return markdown_table(head, cells)


def _changes(study: Study) -> list[str]:
    """Every difference of every arm from the base, including those that defaults bring along."""
    lines = []
    # The budgets of a size have the same.
    for (arm, size), cell in {(cell.arm, cell.size): cell for cell in study.cells}.items():
        changes = "; ".join(
            f"`{k}` {_value(a)} -> {_value(b)}"
            for k, (a, b) in sorted(study.differences(cell).items())
        )
        about = f" ({study.arms[arm]})" if study.arms[arm] else ""
        lines.append(f"- {arm}{about} at {size}: {changes or 'nothing'}")
    return lines


def _value(value: Any) -> str:
    return "unset" if value is None else str(value)


def _tuned(rows: Sequence[Row]) -> list[str]:
    """A line for every search: what was tried, and the result."""
    cells = []
    for row in rows:
        cell = row.cell
        tokens = cell.tune_steps * cell.config.step_tokens
        with_ = "" if tokens == cell.tokens else f", with {tokens:,} tokens"
        with_ += "" if cell.tune_dtype == cell.config.dtype else f", in {cell.tune_dtype}"
        for stage in row.tuning.stages:
            found = stage.search
            tried = ", ".join(
                f"{value:g} ({loss:.4f})" if math.isfinite(loss) else f"{value:g} (diverged)"
                for value, loss in found.losses.items()
            )
            how = (found.note or "unfinished") + with_
            if found.tried and math.isfinite(found.loss):  # nothing is expected of a given one
                how += f"; {found.loss:.4f} expected"
            cells.append([
                cell.arm, f"{cell.size}, {cell.tokens:,}", stage.what, tried or "-",
                _number(found.best), how,
            ])  # fmt: skip
    return markdown_table(["arm", "size, tokens", "what", "tried (loss)", "found", "how"], cells)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _outcome(r: Record) -> str:
    return "diverged" if r.loss is None else f"loss {r.loss:.4f}"
