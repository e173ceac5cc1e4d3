"""Report and plots of compare_backends' results."""

from collections.abc import Callable, Mapping
from typing import Any

from bench.harness import Document, Report, Row
from mlx_mla.pictures import pyplot


def set_rooflines(document: Document) -> None:
    """Give every timed row the share of its time that its FLOPs or bytes need at the document's
    rates."""
    for row in document["rows"]:
        rates = document["rates"].get(row["backend"])
        if rates and row["status"] == "ok":
            need = max(row["flops"] / rates["matmul_flops"], row["bytes"] / rates["memory_bytes"])
            row["roofline"] = need / (row["ms"] / 1e3)


def rate_lines(document: Document) -> list[str]:
    """What each backend does on the machine at best, as a list."""
    return [
        f"- {backend} at its best here: {r['matmul_flops'] / 1e9:,.0f} GFLOP/s in a 2048 x 2048 "
        f"product, {r['memory_bytes'] / 1e9:,.1f} GB/s copying or in a matrix-vector product"
        for backend, r in document["rates"].items()
    ]


def body(document: Document, plots: Mapping[str, str]) -> list[str]:
    """A table and a picture a measure."""
    rows: list[Row] = document["rows"]
    lines = rate_lines(document)
    s = document["settings"]
    lines += [f"- {s['dtype']}, median of {s['repetitions']} runs in turns (smallest - largest)"]
    lines += [
        f"- not timed: {r['backend']} {r['model']}: {r['status']}"
        for r in rows
        if r["measure"] == "parity"
    ]
    lines += [
        "",
        "Ratios are against this project's GPT-2 (MHA) in the same backend and row group. "
        "Roofline is the",
    ]
    lines += [
        "share reached of the time that the FLOPs and bytes of the call need at the rates above.",
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
            lines += [f"![{measure}]({plots[measure]})", ""] if measure in plots else []
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
        "cold tok/s",
        "peak MB",
    )
    lines = [f"| {' | '.join((*names, 'cache MB'))} |", "|---" * (len(names) + 1) + "|"]
    for r in sorted(rows, key=lambda r: (r["batch"], r["context"])):
        what = (r["batch"], r["context"], r["backend"], r["model"], r["cache"] or "-")
        head = f"| {' | '.join(map(str, what))} | "
        if r["status"] != "ok":
            lines.append(head + f"{r['status']} |" + " - |" * 6)
            continue
        t = r["tokens_per_sec"]
        base = _base(rows, r, baseline)
        ratio = "-" if base is None else f"{t['median'] / base['tokens_per_sec']['median']:.2f}x"
        lines.append(
            head
            + f"{_n(t['median'])} ({_n(t['min'])} - {_n(t['max'])}) | {_n(r['ms'])} | {ratio} | "
            f"{r['roofline']:.0%} | {_n(t['cold'])} | {_mb(r.get('peak_memory_bytes'))} | "
            f"{_mb(r.get('cache_bytes'))} |"
        )
    return lines


def _base(rows: list[Row], row: Row, baseline: str | None) -> Row | None:
    """This project's GPT-2 (MHA) under the same conditions."""
    for r in rows:
        same = all(r[k] == row[k] for k in ("measure", "backend", "batch", "context"))
        if same and r["status"] == "ok" and r["model"] == baseline:
            return r
    return None


def _n(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def figures(document: Document) -> dict[str, Any]:
    """What the rows allow, by measure."""
    plt = pyplot()
    ok = [r for r in document["rows"] if r["status"] == "ok"]
    drawn: dict[str, Any] = {}
    for measure in ("forward", "training"):
        rows = [r for r in ok if r["measure"] == measure]
        if rows:
            context, batch = min((r["context"], r["batch"]) for r in rows)
            rows = [r for r in rows if (r["context"], r["batch"]) == (context, batch)]
            fig, ax = plt.subplots(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
            _bars(
                ax,
                sorted(rows, key=lambda r: r["backend"]),
                lambda r: f"{r['backend']}: {r['model']}",
            )
            ax.set(xlabel=f"{measure} tok/s, batch {batch}, {context} tokens")
            drawn[measure] = fig
    decoded = [r for r in ok if r["measure"] == "decoding"]
    if decoded:
        drawn["decoding"] = decoding_figure(decoded)
        fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
        widths = {
            (r["model"], r["cache"]): r["cache_bytes_per_token"]
            for r in decoded
            if r["cache_bytes_per_token"]
        }
        end = max(r["context"] for r in decoded)
        shown: set[int] = set()
        for (model, cache), width in sorted(widths.items(), key=lambda item: -item[1]):
            if width not in shown:
                shown.add(width)
                ax.plot(
                    [0, end],
                    [0, end * width / 1e6],
                    label=f"{model}, {cache}: {width:,} bytes a token",
                )
        ax.set(xlabel="context (tokens)", ylabel="cache of one sequence (MB)")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
        drawn["cache"] = fig
    return drawn


def decoding_figure(decoded: list[Row]) -> Any:
    """Decoding speed against context, a panel for each backend and batch; bars where there is one
    context."""
    panels = [
        (b, n)
        for n in sorted({r["batch"] for r in decoded})
        for b in dict.fromkeys(r["backend"] for r in decoded)
    ]
    columns = len({b for b, _ in panels})
    height = len(panels) // columns
    fig, axes = pyplot().subplots(
        height, columns, figsize=(5.5 * columns, 3.4 * height), layout="constrained", squeeze=False
    )
    color_of = {
        model: f"C{i}" for i, model in enumerate(dict.fromkeys(r["model"] for r in decoded))
    }
    with_latents = {r["model"] for r in decoded if r["cache"] == "latent"}

    def name(r: Row) -> str:
        return f"{r['model']}, {r['cache']}" if r["model"] in with_latents else r["model"]

    for ax, (backend, batch) in zip(axes.flat, panels):
        rows = [r for r in decoded if (r["backend"], r["batch"]) == (backend, batch)]
        contexts = {r["context"] for r in rows}
        if not rows:
            ax.set_axis_off()
            continue
        if len(contexts) == 1:
            _bars(ax, rows, name)
            ax.set(
                title=f"{backend}, batch {batch}",
                xlabel=f"decoding tok/s after {contexts.pop()} tokens",
            )
            ax.tick_params(axis="y", labelsize=7)
            continue
        for model, cache in dict.fromkeys((r["model"], r["cache"]) for r in rows):
            own = [r for r in rows if (r["model"], r["cache"]) == (model, cache)]
            points = sorted((r["context"], r["tokens_per_sec"]["median"]) for r in own)
            style = "--" if model in with_latents and cache == "materialized" else "-"
            ax.plot(
                *zip(*points), style, color=color_of[model], marker="o", ms=3, label=name(own[0])
            )
        ax.set(
            title=f"{backend}, batch {batch}", xlabel="context (tokens)", ylabel="decoding tok/s"
        )
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=6, loc="lower left", framealpha=0.5)
    return fig


def _bars(ax: Any, rows: list[Row], label: Callable[[Row], str]) -> None:
    speeds = [r["tokens_per_sec"]["median"] for r in rows]
    errors = [
        [s - r["tokens_per_sec"]["min"] for s, r in zip(speeds, rows)],
        [r["tokens_per_sec"]["max"] - s for s, r in zip(speeds, rows)],
    ]
    colors = ["C0" if r["backend"] == "mlx" else "C1" for r in rows]
    ax.barh([label(r) for r in rows], speeds, xerr=errors, color=colors, ecolor="0.4")
    ax.invert_yaxis()


REPORT = Report("backends", "MLX and PyTorch side by side", body, figures)
