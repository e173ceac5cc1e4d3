"""Report and plot of bench/decode.py's results."""

from collections.abc import Mapping
from typing import Any

from bench.compare_pictures import decoding_figures
from bench.compare_report import parity_lines, rate_lines, table
from bench.harness import Document, Report, Row


def figures(document: Document) -> dict[str, Any]:
    """Decoding speed against context, by backend."""
    return decoding_figures(document, "decode")


def body(document: Document, pictures: Mapping[str, str]) -> list[str]:
    """Parity, what was chosen, then every cell."""
    rows: list[Row] = document["rows"]
    lines = rate_lines(document)
    s = document["settings"]
    lines += [
        f"- {s['dtype']}, random weights, median of {s['repetitions']} runs (smallest - largest)",
        "",
    ]
    lines += parity_lines(document)
    for name, file in pictures.items():
        lines += [f"![{name}]({file})", ""]
    for title, part in (
        ("What `--cache auto` chooses", _auto(rows)),
        ("Several tokens on a latent cache", _chunks(rows)),
        ("Python's share of a step", _overhead(rows)),
        ("Context that fits", _room(rows)),
    ):
        lines += [f"## {title}", "", *part, ""] if part else []
    decoded = [r for r in rows if r["measure"] == "decoding"]
    if decoded:
        lines += [
            "## Every cell",
            "",
            "Ratios are against the MHA model in the same backend, batch and context.",
            "",
        ]
        lines += table(decoded, document.get("baseline"))
    return lines


def _auto(rows: list[Row]) -> list[str]:
    """The chosen cache against the better one, cell by cell."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        if "auto" in r and r["status"] == "ok":
            cells.setdefault((r["backend"], r["model"], r["batch"], r["context"]), {})[
                r["cache"]
            ] = r
    lines, losses = [], []
    for (backend, model, batch, context), both in sorted(cells.items()):
        if len(both) == 2:
            latent, expanded = both["latent"]["ms"], both["materialized"]["ms"]
            chosen = latent if both["latent"]["auto"] == "latent" else expanded
            losses.append(chosen / min(latent, expanded) - 1)
            lines.append(
                f"| {backend} | {model} | {batch} | {context} | {latent / expanded:.2f} | "
                f"{both['latent']['auto']} | {losses[-1]:+.1%} |"
            )
    if not lines:
        return []
    within = sum(loss <= 0.05 for loss in losses)
    head = [
        f"{within} of {len(losses)} cells within 5 % of the better cache; the worst is "
        f"{max(losses):.1%} slower.",
        "",
    ]
    head += [
        "| backend | model | batch | context | latent's time / materialized's | auto takes | loss |"
    ]
    return [*head, "|---" * 7 + "|", *lines]


def _chunks(rows: list[Row]) -> list[str]:
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        if r["measure"] == "chunk" and r["status"] == "ok":
            cells.setdefault((r["backend"], r["model"], r["context"], r["new"]), {})[r["path"]] = r
    lines = [
        f"| {backend} | {model} | {context} | {new} | "
        + " | ".join(f"{c[p]['ms']:.3g}" for p in ("absorbed", "expanded", "chosen"))
        + f" | {c['expanded']['ms'] / c['chosen']['ms']:.2f}x |"
        for (backend, model, context, new), c in sorted(cells.items())
    ]
    head = (
        "| backend | model | cached | new tokens | absorbed, ms | expanded, ms "
        "| as the model chooses, ms | gain |"
    )
    return [head, "|---" * 8 + "|", *lines] if lines else []


def _overhead(rows: list[Row]) -> list[str]:
    lines = [
        f"| {r['model']} | {r['context']} | {r['cache']} | {r['python_ms']:.2f} | "
        f"{r['compute_ms']:.2f} |"
        for r in rows
        if r["measure"] == "overhead"
    ]
    head = [
        "MLX, batch 1, each step waited for. While text is generated, Python describes the next "
        "step as this one is",
        "computed; the compiled graph reads a cache of fixed size, a multiple of 256 tokens.",
        "",
        "| model | context | step | Python, ms | MLX, ms |",
    ]
    return [*head, "|---" * 5 + "|", *lines] if lines else []


def _room(rows: list[Row]) -> list[str]:
    """Tokens of context that fit beside the weights, from the bytes of the rows."""
    widths = {}
    for r in rows:
        if r.get("cache_bytes_per_token"):
            widths[r["model"], r["cache"]] = (r["weight_bytes"], r["cache_bytes_per_token"])
    lines = []
    for (model, cache), (weights, width) in sorted(widths.items(), key=lambda item: -item[1][1]):
        fits = [int((gb * 1e9 - weights) // width) for gb in (2, 8, 32)]
        shown = " | ".join(f"{n:,} = {n // 1000} x 1000" for n in fits)
        lines.append(f"| {model}, {cache} | {width:,} | {shown} |")
    head = [
        "Batch x context that fits in so much memory beside the weights, by their bytes (working "
        "memory apart).",
        "",
    ]
    head += ["| model, cache | bytes a token | 2 GB | 8 GB | 32 GB |", "|---|---|---|---|---|"]
    return [*head, *lines] if lines else []


REPORT = Report("decode", "Decoding by kind of cache", body, figures)
