"""Types of what the benchmarks measure, and the rows of compare_backends."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Optional, TypedDict

from mlx_mla.fields import Bounds, not_negative, positive


class NotEmpty(Bounds):
    """A list must not be empty."""

    def problem(self, value: Any) -> str | None:
        return None if value else "must not be empty"


LARGEST = 1e18
"""No figure of a benchmark is larger, be it of bytes, of FLOPs or a rate."""
Whole = Annotated[int, not_negative(LARGEST)]
Figure = Annotated[float, not_negative(LARGEST)]
Positive = Annotated[float, positive(LARGEST)]
Positives = Annotated[list[Positive], NotEmpty("", 0)]
Signed = Annotated[float, Bounds("be at least -1e18", -LARGEST, LARGEST)]


def record(fields: Mapping[str, Any]) -> Any:
    """The type of a dictionary with these fields."""
    return TypedDict("Row", dict(fields))  # type: ignore[operator]


def rows(fields: Mapping[str, Any]) -> Any:
    """The type of a list of dictionaries with these fields."""
    return list[record(fields)]  # type: ignore[misc]


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
    """The device's peak rates per second, measured just before and after a row."""

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
    """`overhead` is in the results of earlier versions only; no report shows it."""
    backend: Literal["mlx", "torch"]
    model: str
    cache: Optional[str] = None
    """latent, materialized or none."""
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
