"""Report of compare_backends' results."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.compare_pictures import base_of
from bench.harness import Document
from bench.rows import EAGER, ORIGINAL, PLAIN, Parity, Row
from mlx_mla.display import markdown_table

OTHER_WAYS = ("materialized", "none", ORIGINAL, EAGER, PLAIN)
SPEED = (
    "batch", "tokens", "backend", "model", "cache", "tok/s", "ms", "ratio", "roofline",
    "waited ms", "cold tok/s", "peak MB", "cache MB",
)  # fmt: skip
INTRODUCTION = """\
Ratios are against this project's GPT-2 (MHA) in the same backend and row group. Roofline
is the share reached of the time that the FLOPs and bytes of the call need at the rates
measured beside it. Peak MB is what the subject alone held while it was timed, its
weights and cache included. Waited is the same steps, each waited for before the next is
described.
"""


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """Parity, a table and the pictures of each measure, then summaries."""
    rows: list[Row] = found["rows"]
    s, shown = found["settings"], {n: f"![{n}]({file})" for n, file in pictures.items()}
    repetitions = f"median of {s['repetitions']} runs (smallest - largest)"
    lines = [*_rates(rows), f"- {s.get('dtype', 'float32')}, {repetitions}", ""]
    lines += [*_section("Parity", _parity(found.get("parity", []))), INTRODUCTION]
    for measure in ("forward", "first token", "decoding", "training"):
        lines += _section(measure.capitalize(), _speeds(rows, measure, found.get("baseline")))
        own = [name for name in shown if name.split("-")[0] == measure.split()[0]]
        lines += [line for name in own for line in (shown[name], "")]
    lines += _section("Other ways to run the same model", _ways(rows))
    lines += _section("Several tokens on a latent cache", _chunks(rows))
    lines += _section("Saving a checkpoint", _saves(rows))
    lines += _section("Context that fits", _room(rows))
    return lines + _section("Cache memory", [shown["cache"]] if "cache" in shown else [])


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""] if lines else []


def _rates(rows: list[Row]) -> Iterator[str]:
    """Each backend's peak rates on this machine."""

    def span(values: Sequence[float]) -> str:
        low, high = _n(min(values)), _n(max(values))
        return low if low == high else f"{low} to {high}"

    for backend in dict.fromkeys(r.backend for r in rows):
        rates = [r.rates for r in rows if r.backend == backend and r.rates]
        if rates:
            yield (
                f"- {backend} at its best beside the rows: "
                f"{span([r['matmul_flops'] / 1e9 for r in rates])} GFLOP/s in a square product, "
                f"{span([r['memory_bytes'] / 1e9 for r in rates])} GB/s copying or in a "
                "matrix-vector product"
            )


def _parity(found: list[Parity]) -> list[str]:
    """What the parity gate found."""
    header = (
        "weights", "implementation", "against", "positions", "largest difference of a logit",
        "allowed", "",
    )  # fmt: skip
    rows = [
        (
            f["weights"], f"{f['backend']} {f['model']}", f["against"], f["positions"],
            f"{f['largest_logit_difference']:.2g}", f"{f['allowed']:g}",
            "agrees" if f["ok"] else "not timed",
        )
        for f in found
    ]  # fmt: skip
    intro = "The same weights in every implementation. What differs by more is not timed."
    return [intro, "", *markdown_table(header, rows)] if rows else []


def _speeds(rows: list[Row], measure: str, baseline: str | None) -> list[str]:
    """The table of a measure, without columns that are empty."""
    own = sorted((r for r in rows if r.measure == measure), key=lambda r: (r.batch, r.context))
    cells: list[Sequence[object]] = [SPEED]
    for r in own:
        head = [r.batch, r.context, r.backend, r.model, r.cache or "-"]
        t, base = r.tokens_per_sec, base_of(own, r, baseline)
        if not t:
            cells.append([*head, r.status, *"-" * 7])
            continue
        cells.append([
            *head, f"{_n(t['median'])} ({_n(t['min'])} - {_n(t['max'])})", _n(r.ms),
            f"{r.speed / base.speed:.2f}x" if base else "-",
            "-" if r.roofline is None else f"{r.roofline:.0%}", _n(r.waited_ms),
            _n(t.get("cold")), _mb(r.peak_bytes), _mb(r.cache_bytes),
        ])  # fmt: skip
    columns = [column for column in zip(*cells) if set(column[1:]) - {"-"}]
    header, *lines = zip(*columns) if columns else [()]
    return markdown_table(header, lines)


def _ways(rows: list[Row]) -> list[str]:
    """Decoding on latents against other caches and none; training against other loops."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        if r.speed and r.measure in ("decoding", "training"):
            backend = r.backend if r.measure == "decoding" else ""
            groups.setdefault((r.measure, r.way[0], r.batch, r.context, backend), []).append(r)
    lines, slower = [], []
    for own in groups.values():
        others = [r for r in own if r.way[1] in OTHER_WAYS]
        for r in (r for r in own if r.way[1] not in OTHER_WAYS and others):
            ratios = {o.way[1]: r.speed / o.speed for o in others}
            if "materialized" in ratios:
                slower.append(1 / ratios["materialized"] - 1)
            lines.append((
                r.measure, r.backend, r.model, r.batch, r.context, r.cache or "-",
                ", ".join(f"{ratio:.3g}x {way}" for way, ratio in ratios.items()),
            ))  # fmt: skip
    header = ("measure", "backend", "model", "batch", "tokens", "cache", "speed, times that of")
    text = [
        f"On latents a step takes at most {max(0.0, *slower):.1%} longer than on expanded keys "
        f"and values, over {len(slower)} cells.",
        "",
    ] if slower else []  # fmt: skip
    return [*text, *markdown_table(header, lines)] if lines else []


def _chunks(rows: list[Row]) -> list[str]:
    cells: dict[tuple[Any, ...], dict[str | None, Row]] = {}
    for r in rows:
        if r.measure == "chunk" and r.speed:
            cells.setdefault((r.backend, r.model, r.context, r.new), {})[r.path] = r
    header = ("backend", "model", "cached", "new tokens", "absorbed, ms", "expanded, ms",
              "as the model chooses, ms", "gain over expanded")  # fmt: skip
    paths = ("absorbed", "expanded", "chosen")
    lines = [
        (*key, *(_n(c[p].ms) for p in paths), f"{c['chosen'].speed / c['expanded'].speed:.2f}x")
        for key, c in sorted(cells.items())
        if all(p in c for p in paths)
    ]
    return markdown_table(header, lines)


def _saves(rows: list[Row]) -> list[str]:
    lines = [
        (r.backend, r.model, f"{r.ms / 1e3:.3g}", _mb(r.bytes), _n(r.bytes / 1e3 / r.ms))
        for r in rows
        if r.measure == "save" and r.ms and r.bytes
    ]
    return markdown_table(("backend", "model", "seconds", "MB", "MB/s"), lines)


def _room(rows: list[Row]) -> list[str]:
    """Tokens of context that fit beside the weights, from the bytes of the rows."""
    widths = {
        (r.model, r.cache): (r.weight_bytes, r.cache_bytes_per_token)
        for r in rows
        if r.measure == "decoding" and r.weight_bytes and r.cache_bytes_per_token
    }
    lines = [
        (f"{model}, {cache}", f"{width:,}", *(f"{(g * 1e9 - w) / width:,.0f}" for g in (2, 8, 32)))
        for (model, cache), (w, width) in sorted(widths.items(), key=lambda item: -item[1][1])
    ]
    intro = "Tokens, batch x context, that fit into so much memory beside the weights, by their"
    table = markdown_table(("model, cache", "bytes a token", "2 GB", "8 GB", "32 GB"), lines)
    return [intro, "bytes (working memory apart).", "", *table] if table else []


def _n(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"
