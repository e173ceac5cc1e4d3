"""The rows of compare_backends, and what earlier versions wrote in their place."""

import dataclasses
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional

from typing_extensions import NotRequired, TypedDict

from bench.reading import REMEDY, Document, Figure, Positive, Positives, Whole, record
from mlx_mla.fields import value_of

ORIGINAL, EAGER, PLAIN = "original's decoding", "eager step", "plain PyTorch loop"
"""Ways to decode or to train that are not this project's; such a row's model is "WAY (MODEL)"."""


class Speed(TypedDict):
    """Tokens per second: of the repetitions, and of the first run, before warm-up."""

    median: Positive
    min: Positive
    max: Positive
    cold: NotRequired[Positive]
    values: NotRequired[Positives]


class Rates(TypedDict):
    """The best that the device showed just before and just after a row, a second."""

    matmul_flops: Positive
    """Of a square product."""
    memory_bytes: Positive
    """Copying, or in a matrix-vector product."""


class Parity(TypedDict):
    """A subject's logits against those of the first with the same weights."""

    weights: str
    backend: str
    model: str
    against: str
    largest_logit_difference: Figure
    allowed: Figure
    positions: Whole
    ok: bool


@dataclasses.dataclass(kw_only=True)
class Row:
    """One measurement of one subject. Where the framework does not report a value, it is None."""

    measure: Literal["forward", "first token", "decoding", "training", "chunk", "overhead", "save"]
    backend: Literal["mlx", "torch"]
    model: str
    cache: Optional[str] = None
    """latent, materialized or none; of overhead, eager or compiled."""
    batch: Whole
    context: Whole
    """Tokens of a sequence: read, cached or trained on."""
    new: Optional[Whole] = None
    """Tokens of a chunk."""
    path: Optional[str] = None
    """How a chunk is computed: absorbed, expanded or chosen (by the model)."""
    status: str = "ok"
    """"ok", or why there are no figures."""
    tokens_per_sec: Optional[Speed] = None
    ms: Optional[Positive] = None
    """Median of the whole call."""
    waited_ms: Optional[Figure] = None
    """The same steps, each waited for before the next is described."""
    python_ms: Optional[Figure] = None
    """Of overhead: what Python takes to describe a step; `ms` is what MLX takes to compute it."""
    peak_bytes: Optional[Whole] = None
    """Most that the subject held while it was timed: weights, cache and working memory."""
    cache_bytes: Optional[Whole] = None
    """With the room that the cache keeps for tokens to come."""
    cache_bytes_per_token: Optional[Whole] = None
    weight_bytes: Optional[Whole] = None
    flops: Optional[Figure] = None
    """That one call must compute."""
    bytes: Optional[Figure] = None
    """That one call must move."""
    rates: Optional[Rates] = None
    roofline: Optional[Figure] = None
    """The time that `flops` and `bytes` need at `rates`, as a share of the time taken."""

    KEY: ClassVar = ("measure", "backend", "model", "cache", "batch", "context", "new", "path")

    @property
    def key(self) -> dict[str, Any]:
        """What tells a row from all others."""
        return {name: getattr(self, name) for name in self.KEY}

    @property
    def speed(self) -> float:
        """Tokens per second; 0 for a row without a rate."""
        return self.tokens_per_sec["median"] if self.tokens_per_sec else 0.0

    @property
    def way(self) -> tuple[str, str]:
        """The model, and how it is run: a kind of cache, or another project's way."""
        other = re.fullmatch(r"(.+?) \((.+)\)", self.model)
        return (other[2], other[1]) if other else (self.model, self.cache or "as usual")

    def set_roofline(self) -> None:
        """Set `roofline` where the fields that it follows from are known."""
        if self.rates and self.ms and self.speed:
            need = max(
                (self.flops or 0.0) / self.rates["matmul_flops"],
                (self.bytes or 0.0) / self.rates["memory_bytes"],
            )
            self.roofline = need / (self.ms / 1e3)


NAMES = {"convert_mla": "convert", "decode_trained": "trained"}
OLD = record({
    "what": str, "preset": str, **dict.fromkeys(("case", "dtype"), NotRequired[str]),
    **dict.fromkeys(("median", "min", "max"), NotRequired[Positive]),
    **dict.fromkeys(("context", "tokens", "cache_bytes", "bytes"), NotRequired[Whole]),
})  # fmt: skip


def upgraded(document: Document, path: Path) -> Document:
    """A document of an earlier version in today's form; UserError names what is damaged."""
    report = str(document.pop("report", "")).removeprefix("bench.").removesuffix("_report")
    if report and "benchmark" not in document:
        document["benchmark"] = NAMES.get(report, report)
        if report in ("core", "training"):
            parts: dict[str, list[Any]] = {"rows": []}
            for row in value_of(list[OLD], document.get("rows"), str(path), REMEDY, at="rows"):  # type: ignore[valid-type]
                part = row["what"] if row["what"] in ("memory", "plan") else "rows"
                parts.setdefault(part, []).append(_row(row) if part == "rows" else row)
            document |= parts
    return document


def _row(old: dict[str, Any]) -> dict[str, Any]:
    """A row of `core`, or of the speeds of `training`, as one of today's."""
    what, model, case = old["what"], old["preset"], old.get("case", "")
    ways = {"eager": f"{EAGER} ({model})", PLAIN: f"{PLAIN} ({model})"}
    row = {
        "measure": {"decoding": "decoding", "checkpoint": "save"}.get(what, "training"),
        "backend": "torch" if case in ("torch", PLAIN) else "mlx", "batch": 1,
        "model": ways.get(case, model), "context": old.get("context", old.get("tokens", 0)),
        "cache": case if what == "decoding" else None,
        "cache_bytes": old.get("cache_bytes"), "bytes": old.get("bytes"),
    }  # fmt: skip
    speed = {k: old[k] for k in ("median", "min", "max") if k in old}
    if what == "checkpoint":  # in seconds
        return {**row, "ms": 1e3 * speed["median"]} if speed else row
    if what == "training step":  # of `nano`, in steps a second
        row |= {"batch": 4, "context": 256}
        speed = {k: 4 * 256 * v for k, v in speed.items()}
    return {**row, "tokens_per_sec": speed}
