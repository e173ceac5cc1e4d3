"""Results of an evaluation as tables for the terminal, as Markdown and as a plot."""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from mlx_mla.display import markdown_table
from mlx_mla.errors import UserError
from mlx_mla.evaluation.tasks import Measured
from mlx_mla.evaluation.tasks.base import compare
from mlx_mla.fields import read
from mlx_mla.files import finite, write_text
from mlx_mla.pictures import draw, plain


class _Model(TypedDict):
    model: str
    tasks: dict[str, dict[str, Any]]
    """Metrics by task: NAME, NAME_stderr, NAME_count and so on, and n, the number of items."""


class ResultsFile(TypedDict):
    """The file that `mlx_mla.evaluate --out` writes."""

    protocol: str
    models: list[_Model]
    comparisons: list[dict[str, Any]]


def read_results(path: Path) -> ResultsFile:
    """Read a results file that `write` wrote; UserError if it holds anything else."""
    return read(ResultsFile, path, "give --out a new name")


def compare_models(
    first: str, second: str, task: str, of_first: Sequence[Measured], of_second: Sequence[Measured],
    same_tokens: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Compare two models on the same items, one row per metric.

    A row has no figures if the models count different units, or there is a single item.

    Args:
        same_tokens: Whether both have one vocabulary. If not, a figure by token is not compared.
    """
    rows = []
    for a, b in zip(of_first, of_second):
        row: dict[str, Any] = {"first": first, "second": second, "task": task, "metric": a.name}
        result = compare(a, b) if same_tokens or a.unit != "token" else None
        if result is not None:
            row |= {
                "relative": a.perplexity,
                "difference": result.difference,
                "low": result.low,
                "high": result.high,
                "shown": result.shown,
            }
        rows.append(row)
    return rows


def tables(document: dict[str, Any]) -> str:
    """The results as Markdown that is also readable on a terminal."""
    models = document["models"]
    header = ["task", "metric", *(m["model"] for m in models)]
    rows = []
    for task, metric in _names(models):
        rows.append([task, metric, *(_cell(m["tasks"].get(task, {}), metric) for m in models)])
    lines = markdown_table(header, rows, padded=True)
    if document["comparisons"]:
        lines += [
            "",
            f"Compared with {models[0]['model']} on the same items (95 % confidence interval):",
            "",
        ]
        body = [
            [c["task"], c["metric"], c["second"], _difference(c)] for c in document["comparisons"]
        ]
        lines += markdown_table(["task", "metric", "model", "difference"], body, padded=True)
    lines += [
        "",
        f"Protocol: {document['protocol']}. ± is one standard error. Parentheses hold the 95 % "
        "Wilson interval of a proportion, or the range of 5 runs of a speed.",
    ]
    lines += [f"- {note}." for note in document["notes"]]
    return "\n".join(lines)


def items_folder(out: Path) -> Path:
    """Folder of the per-item scores, beside the results file."""
    return out.with_name(f"{out.name}.items")


def claim(out: Path, resume: bool) -> None:
    """Check that results can be written and that only results to resume are replaced.

    Args:
        resume: True to allow results that exist already.

    Raises:
        UserError: If they cannot, before anything is computed.
    """
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out {out}: must be a file ending in .json; the report goes beside it")
    plot, text = _beside(out)
    began = resume and (items_folder(out).is_dir() or out.exists())
    if began and out.exists():
        read_results(out)
    if out.exists() and not resume:
        raise UserError(f"{out}: exists; add --resume to continue it, or give --out a new name")
    for path in (plot, text, items_folder(out)):
        if path.exists() and not began:
            raise UserError(
                f"--out {out}: {path} exists and would be replaced; give --out a new name"
            )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as e:
        raise UserError(f"--out {out}: cannot be written: {e.strerror}; give another path") from e


def write(document: dict[str, Any], out: Path) -> None:
    """Write the results file, with the report and the plot beside it; UserError if writing
    fails."""
    write_text(out, json.dumps(finite(document), indent=1) + "\n")
    plot, text = _beside(out)
    _plot(document, plot)
    write_text(text, f"# Evaluation\n\n{tables(document)}\n\n![scores]({plot.name})\n")


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_suffix(".png"), out.with_suffix(".md")


def _names(models: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    names: dict[tuple[str, str], None] = {}
    for model in models:
        for task, values in model["tasks"].items():
            for key in values:
                if key != "n" and not key.endswith(("_stderr", "_count", "_low", "_high")):
                    names[task, key] = None
    return list(names)


def _cell(values: dict[str, Any], metric: str) -> str:
    value = values.get(metric)
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['median']:,.1f} ({value['min']:,.1f} - {value['max']:,.1f})"
    if f"{metric}_low" in values:
        low, high = 100 * values[f"{metric}_low"], 100 * values[f"{metric}_high"]
        digits = _digits((high - low) / 4)
        return f"{100 * value:.{digits}f} % ({low:.{digits}f} - {high:.{digits}f})"
    error = values.get(f"{metric}_stderr")
    if not math.isfinite(value) or value >= 1e6:  # a model that has learned nothing
        return f"{value:.2g}"
    spread = "" if error is None or math.isnan(error) else f" ± {error:.{_digits(error)}f}"
    return f"{value:.{_digits(error or value)}f}{spread}"


def _digits(error: float) -> int:
    """Number of decimals that shows an error with two significant digits."""
    if not math.isfinite(error) or error <= 0:
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(error))))


def _difference(row: dict[str, Any]) -> str:
    if "difference" not in row:
        return "not comparable: the models count different tokens, or a single item"
    low, high, value = (100 * row[k] for k in ("low", "high", "difference"))
    unit = " %" if row["relative"] else " pp" if "acc" in row["metric"] else ""
    if not unit:
        low, high, value = low / 100, high / 100, value / 100
    digits = _digits((high - low) / 4)
    text = f"{value:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f})"
    return text if row["shown"] else f"{text}: no difference shown"


def _reach(values: dict[str, Any], metric: str) -> tuple[float, float]:
    """Lengths of a metric's error bar below and above: a proportion's interval, or one standard
    error."""
    if f"{metric}_low" in values:
        value = values[metric]
        return value - values[f"{metric}_low"], values[f"{metric}_high"] - value
    error = values.get(f"{metric}_stderr") or 0.0
    return (error, error) if math.isfinite(error) else (0.0, 0.0)


def _plot(document: dict[str, Any], path: Path) -> None:
    models = document["models"]
    names = [n for n in _names(models) if n[0] != "speed"] or _names(models)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    size = (3.2 * columns, 2.8 * rows)

    def paint(figure: Any) -> None:
        axes = figure.subplots(rows, columns, squeeze=False)
        _paint_scores(axes, models, names)
        legend = "   ".join(f"{i}: {plain(m['model'])}" for i, m in enumerate(models, 1))
        figure.suptitle(legend, fontsize=8)

    draw(path, paint, optional=True, figsize=size, layout="constrained")


def _paint_scores(
    axes: Any, models: Sequence[dict[str, Any]], names: Sequence[tuple[str, str]]
) -> None:
    for axis in axes.flat[len(names) :]:
        axis.remove()
    for axis, (task, metric) in zip(axes.flat, names):
        own = [m["tasks"].get(task, {}) for m in models]
        values = [v.get(metric) for v in own]
        heights = [
            v["median"] if isinstance(v, dict) else v if v and math.isfinite(v) else 0
            for v in values
        ]
        errors = [_reach(v, metric) for v in own]
        labels = [f"{i}" for i in range(1, len(models) + 1)]
        axis.bar(
            labels,
            heights,
            yerr=list(zip(*errors)),
            color=[f"C{i}" for i in range(len(models))],
            capsize=3,
        )
        axis.set_title(f"{task} {metric}", fontsize=9)
