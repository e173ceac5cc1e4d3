"""The report beside a model that was converted to MLA: conversion.json and conversion.png."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mlx_mla.files import finite
from mlx_mla.pictures import draw

ERRORS = ("closed_form", "refit", "fit")
"""The steps of a layer's conversion: the closed form, the output projection refitted, all matrices
fitted."""


@dataclasses.dataclass
class Report:
    """What the conversion did, and what it cost."""

    source: str
    kv_lora_ranks: list[int]
    """Per layer."""
    widest: int
    """The width from which a latent would hold all that there is."""
    cache_bytes_per_token: dict[str, int]
    """"before" and "after", over all layers, in 16-bit types."""
    kept_energy: list[float]
    """Per layer, the share of the squared singular values that is kept."""
    singular_values: list[list[float]]
    """Per layer, in the units of the error, to five digits."""
    calibration: dict[str, Any] | None = None
    """"text" and "tokens" of the moments."""
    rope_energy: list[float] | None = None
    """Per layer, the share of the keys' energy, as the queries weigh it, in the shared RoPE key."""
    residual_error: dict[str, list[float]] | None = None
    """Per layer and step of ERRORS, the squared error of the residual stream after the attention on
    the calibration text, relative to each token's stream."""
    perplexity: dict[str, Any] | None = None
    """On the held-out end of the calibration text: "before", "after", "tokens", and "masked_rows"
    of the vocabulary."""

    def sentences(self) -> list[str]:
        """The report in a few sentences, for the model card and the terminal."""
        before, after = self.cache_bytes_per_token["before"], self.cache_bytes_per_token["after"]
        text = [
            f"Attention converted to MLA: kv_lora_rank {self._rank()} of {self.widest}, keeping "
            f"{min(self.kept_energy):.2%} to {max(self.kept_energy):.2%} of a layer's energy.",
            f"Cache per token: {before:,} bytes before, {after:,} after ({before / after:.3g} "
            "times less).",
        ]
        if self.calibration:
            text.append(
                f"Calibrated on {self.calibration['tokens']:,} tokens of "
                f"{self.calibration['text']}."
            )
        if self.rope_energy:
            text.append(
                f"The shared RoPE key holds {min(self.rope_energy):.2%} to "
                f"{max(self.rope_energy):.2%} of the energy of a layer's keys; the rest is without "
                "RoPE."
            )
        if r := self.residual_error:
            text.append(
                "Squared error of the last residual stream after attention: "
                f"{r['closed_form'][-1]:.2%} from the closed form and {r['fit'][-1]:.2%} fitted."
            )
        if p := self.perplexity:
            masked = f", {p['masked_rows']} rows of padding masked" if p["masked_rows"] else ""
            text.append(
                f"Perplexity on {p['tokens']:,} held-out tokens: {p['before']:.4f} before, "
                f"{p['after']:.4f} after ({p['after'] / p['before'] - 1:+z.2%}{masked})."
            )
        return text

    @property
    def _shared(self) -> bool:
        return len(set(self.kv_lora_ranks)) > 1

    def _rank(self) -> str:
        ranks = self.kv_lora_ranks
        if not self._shared:
            return str(ranks[0])
        return f"{min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):g} on average,"

    def write(self, folder: Path) -> None:
        """Write both files into a folder."""
        text = json.dumps(finite(dataclasses.asdict(self)), indent=1, allow_nan=False)
        (folder / "conversion.json").write_text(text + "\n", encoding="utf-8")
        self._plot(folder / "conversion.png")

    def _plot(self, path: Path) -> None:
        size = (10, 4)
        draw(
            path,
            lambda fig: self._paint(*fig.subplots(1, 2)),
            optional=True,
            figsize=size,
            layout="constrained",
        )

    def _paint(self, left: Any, right: Any) -> None:
        from matplotlib import colormaps

        colors = colormaps["viridis"]
        n = len(self.singular_values)
        for i, values in enumerate(self.singular_values):
            values, top = values[: self.widest], values[0] or 1.0
            label = f"layer {i}" if i in (0, n - 1) else None
            left.plot(
                range(1, len(values) + 1),
                [v / top for v in values],
                color=colors(i / max(1, n - 1)),
                label=label,
            )
        mean = sum(self.kv_lora_ranks) / n
        left.axvline(
            mean,
            color="black",
            ls="--",
            lw=1,
            label=f"{'mean ' if self._shared else ''}rank {mean:g}",
        )
        left.set(
            yscale="log",
            xlabel="index",
            ylabel="singular value / largest",
            title="spectrum of what the latent holds",
        )
        left.set_ylim(bottom=1e-6)
        left.legend()
        right.bar(range(n), [1 - kept for kept in self.kept_energy])
        right.locator_params(axis="x", integer=True)
        right.set(
            xlabel="layer",
            ylabel="share of energy lost",
            title=f"rank {self._rank()} of {self.widest}",
        )
        for ax in (left, right):
            ax.grid(alpha=0.3)
