"""Report of compare_backends' results."""

from collections.abc import Mapping

from bench.compare_pictures import base_of, figures
from bench.harness import Document, Report, Row


def set_rooflines(document: Document) -> None:
    """Give every timed row the share of its time that its FLOPs or bytes need at the rates that
    were measured beside it."""
    for row in document["rows"]:
        if "rates" in row and row["status"] == "ok":
            rates = row["rates"]
            need = max(row["flops"] / rates["matmul_flops"], row["bytes"] / rates["memory_bytes"])
            row["roofline"] = need / (row["ms"] / 1e3)


def rate_lines(document: Document) -> list[str]:
    """What each backend does on the machine at best, as a list."""
    lines = []
    for backend in dict.fromkeys(r["backend"] for r in document["rows"]):
        rates = [r["rates"] for r in document["rows"] if r["backend"] == backend and "rates" in r]
        if not rates and backend in document.get("rates", {}):
            rates = [document["rates"][backend]]  # measured before rates were beside every row
        if rates:
            flops, memory = (
                _span([r[key] / 1e9 for r in rates]) for key in ("matmul_flops", "memory_bytes")
            )
            lines.append(
                f"- {backend} at its best beside the rows: {flops} GFLOP/s in a square product, "
                f"{memory} GB/s copying or in a matrix-vector product"
            )
    return lines


def _span(values: list[float]) -> str:
    low, high = _n(min(values)), _n(max(values))
    return low if low == high else f"{low} to {high}"


def parity_lines(document: Document) -> list[str]:
    """What the parity gate found, as a section."""
    found: list[Row] = document.get("parity", [])
    if not found:
        return []
    lines = [
        "## Parity",
        "",
        f"The same weights in every implementation, {document['settings']['dtype']}. What differs "
        "by more is not timed.",
        "",
        "| weights | implementation | against | positions | largest difference of a logit "
        "| allowed | |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['weights']} | {f['backend']} {f['model']} | {f['against']} | {f['positions']} "
        f"| {f['largest_logit_difference']:.2g} | {f['allowed']:g} "
        f"| {'agrees' if f['ok'] else 'not timed'} |"
        for f in found
    ]
    return [*lines, ""]


def body(document: Document, plots: Mapping[str, str]) -> list[str]:
    """Parity, then a table and a picture a measure."""
    rows: list[Row] = document["rows"]
    lines = rate_lines(document)
    s = document["settings"]
    lines += [f"- {s['dtype']}, median of {s['repetitions']} runs (smallest - largest)", ""]
    lines += parity_lines(document)
    lines += [
        "Ratios are against this project's GPT-2 (MHA) in the same backend and row group. "
        "Roofline is the",
        "share reached of the time that the FLOPs and bytes of the call need at the rates measured "
        "beside it.",
        "Peak MB is what the subject alone held while it was timed, its weights and cache "
        "included; waited is",
        "the same steps where each is waited for before the next is described.",
        "",
    ]
    for measure in ("forward", "first token", "decoding", "training"):
        chosen = [r for r in rows if r["measure"] == measure]
        if chosen:
            lines += [
                f"## {measure.capitalize()}",
                "",
                *table(chosen, document.get("baseline")),
                "",
            ]
            for name, file in plots.items():
                if name.split("-")[0] == measure.split()[0]:
                    lines += [f"![{name}]({file})", ""]
    if "cache" in plots:
        lines += ["## Cache memory", "", f"![cache]({plots['cache']})"]
    return lines


def table(rows: list[Row], baseline: str | None) -> list[str]:
    names = (
        "batch",
        "tokens",
        "backend",
        "model",
        "cache",
        "tok/s",
        "ms",
        "ratio",
        "roofline",
        "waited ms",
        "cold tok/s",
        "peak MB",
    )
    lines = [f"| {' | '.join((*names, 'cache MB'))} |", "|---" * (len(names) + 1) + "|"]
    for r in sorted(rows, key=lambda r: (r["batch"], r["context"])):
        what = (r["batch"], r["context"], r["backend"], r["model"], r["cache"] or "-")
        head = f"| {' | '.join(map(str, what))} | "
        if r["status"] != "ok":
            lines.append(head + f"{r['status']} |" + " - |" * 7)
            continue
        t = r["tokens_per_sec"]
        base = base_of(rows, r, baseline)
        ratio = "-" if base is None else f"{t['median'] / base['tokens_per_sec']['median']:.2f}x"
        lines.append(
            head
            + f"{_n(t['median'])} ({_n(t['min'])} - {_n(t['max'])}) | {_n(r['ms'])} | {ratio} | "
            f"{_share(r.get('roofline'))} | {_ms(r.get('waited_ms'))} | {_n(t['cold'])} | "
            f"{_mb(r.get('peak_bytes'))} | "
            f"{_mb(r.get('cache_bytes'))} |"
        )
    return lines


def _n(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else _n(value)


REPORT = Report("backends", "MLX and PyTorch side by side", body, figures)
