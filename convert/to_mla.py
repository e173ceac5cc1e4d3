"""A model with multi-head attention becomes one with latent attention."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.estimate import cache_bytes_per_token

from .latent import (
    Decomposition,
    Moments,
    decompose,
    kept_energy,
    share_ranks,
    to_latent,
)
from .report import ERRORS, Report

if TYPE_CHECKING:
    import torch

    from mlx_mla.model.model_torch import MLAGPT2LMHeadModel

    from .calibration import Text

Weights = dict[str, np.ndarray]

CALIBRATION_TOKENS, HELD_OUT_TOKENS = 65536, 32768
CALIBRATION_WINDOW = 512
"""Tokens of a window of calibration text, at most."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Text to weigh the factorisation by, and how much of it."""

    text: "Text"
    max_tokens: int
    held_out_tokens: int
    device: "torch.device"


@dataclasses.dataclass(frozen=True)
class Rank:
    """How wide the latents are to be."""

    width: int
    shared: bool = False
    """The width is an average, shared out among the layers."""


def check_rank(config: ModelConfig, rank: int | None, budget: int | None = None) -> Rank:
    """The latent width of --rank or --rank-budget, if it is possible for a model; UserError
    otherwise."""
    if config.attention == "mla":
        raise UserError("--to mla: the model's attention is MLA already; leave out --to mla")
    if rank is not None and budget is not None:
        raise UserError("--rank and --rank-budget exclude each other; leave one out")
    name, width = ("--rank-budget", budget) if rank is None else ("--rank", rank)
    widest = widest_latent(config)
    bound = f"{widest} (all that there is)"
    if not config.beyond_gpt2:
        bound = f"the model's n_embd, {widest} (exact)"
    if width is None:
        raise UserError(f"--to mla needs --rank R or --rank-budget R, from 1 to {bound}")
    if not 1 <= width <= widest:
        raise UserError(f"{name} must be from 1 to {bound}, not {width}")
    return Rank(width, rank is None)


def check_calibration(config: ModelConfig, calibration: str | None) -> None:
    """UserError where a model needs a calibration text."""
    if calibration is None and (beyond := config.beyond_gpt2):
        raise UserError(f"--to mla needs --calibration TEXT for a model with {' '.join(beyond)}")


def widest_latent(config: ModelConfig) -> int:
    """The width from which a latent holds all that is left to hold, beside the RoPE key if there
    is one."""
    if not config.beyond_gpt2:
        return config.n_embd
    width = config.attention_spec.head_dim
    groups = config.num_key_value_heads or config.n_head
    keys = groups - (config.position_embedding_type == "rope")
    return min(config.n_embd + bool(config.attention_bias), (keys + groups) * width)


def convert_to_mla(
    name: str,
    config: ModelConfig,
    weights: Weights,
    rank: Rank,
    calibration: Calibration | None,
    console: Console,
) -> tuple[ModelConfig, Weights, Report]:
    """Give every layer a latent, and say what it cost.

    Args:
        name: What the source is called, for the report.
        config: Resolved; multi-head attention.
        weights: float32, in this project's layout.
        calibration: Needed beyond GPT-2's own attention; where there is one, perplexity is measured
            too, in PyTorch.
    """
    if calibration is None:
        new_config, new, layers = without_text(config, weights, rank)
        return new_config, new, _report(name, config, new_config, layers)
    from mlx_mla.backends.torch.load import build_model

    from .calibration import perplexity

    text = calibration.text
    model = build_model(config, weights, calibration.device)
    before, scored = perplexity(model, text, calibration.held_out_tokens)
    diverged = UserError(
        f"{name}: its perplexity on the calibration text is {before:.4g}, so its training has "
        "diverged; take an earlier checkpoint"
    )
    if not before < 1e30:
        raise diverged
    try:
        new_config, new, layers = with_text(model, config, weights, rank, calibration, console)
    except np.linalg.LinAlgError:  # of values that overflow
        raise diverged from None
    del model
    report = _report(name, config, new_config, layers)
    report.calibration = {"text": text.name, "tokens": layers.tokens}
    model = build_model(new_config, new, calibration.device)
    after, _ = perplexity(model, text, calibration.held_out_tokens)
    assert config.vocab_size
    masked = config.vocab_size - len(text.tokenizer)
    report.perplexity = {
        "before": before, "after": after, "tokens": scored, "masked_rows": masked,
    }  # fmt: skip
    return new_config, new, report


@dataclasses.dataclass
class Layers:
    """What became of each layer."""

    ranks: list[int]
    spectra: list[np.ndarray]
    """Singular values of its factors."""
    rope_energy: list[float] | None = None
    errors: list[tuple[float, float, float]] | None = None
    tokens: int = 0
    """Calibrated on."""


def without_text(
    config: ModelConfig, weights: Weights, rank: Rank
) -> tuple[ModelConfig, Weights, Layers]:
    """Latents that change GPT-2's weights least."""
    layers: Iterable[Decomposition] = factorise(config, weights, None)
    ranks = [rank.width] * config.n_layer
    if rank.shared:
        layers = list(layers)
        ranks = share_ranks([x.singular_values for x in layers], rank.width, comparable=False)
    spectra: list[np.ndarray] = []

    def noted() -> Iterator[Decomposition]:
        for layer in layers:
            spectra.append(layer.singular_values)
            yield layer

    return *assemble(config, weights, ranks, noted(), None), Layers(ranks, spectra)


def with_text(
    model: "MLAGPT2LMHeadModel",
    config: ModelConfig,
    weights: Weights,
    rank: Rank,
    calibration: Calibration,
    console: Console,
) -> tuple[ModelConfig, Weights, Layers]:
    """Latents fitted to a text, layer after layer.

    Args:
        model: The source, whose configuration and weights follow.
    """
    from .calibration import collect_moments
    from .layerwise import convert_layers, source_weights
    from .rope import spectrum

    text, tokens, beyond = calibration.text, calibration.max_tokens, bool(config.beyond_gpt2)
    windows = text.windows(tokens)
    ranks, spectra, start = [rank.width] * config.n_layer, [], None
    if not beyond or rank.shared:
        moments, _ = collect_moments(model, text, tokens, not beyond, console)
    if not beyond:
        factors = list(factorise(config, weights, moments))
        spectra = [layer.singular_values for layer in factors]
    elif rank.shared:
        spectra = [
            spectrum(source_weights(model, i), m.mean, m.covariance) for i, m in enumerate(moments)
        ]
    if rank.shared:
        ranks = share_ranks(spectra, rank.width, comparable=not beyond)
    if beyond:
        new_config = latent_config(config, ranks)
        new = {n: w for n, w in weights.items() if ".attn." not in n}
    else:
        new_config, new = assemble(config, weights, ranks, factors, moments)
        start = [
            {n.split(".attn.")[1]: w for n, w in new.items() if f".h.{i}.attn." in n}
            for i in range(config.n_layer)
        ]
        del factors, moments
    results = []
    for i, layer in enumerate(convert_layers(model, new_config, windows, start, console)):
        new |= {f"transformer.h.{i}.attn.{n}": w for n, w in layer.weights.items()}
        layer.weights.clear()
        results.append(layer)
    found = Layers(ranks, spectra, errors=[r.errors for r in results], tokens=windows.size)
    if beyond:
        found.spectra = [r.singular_values for r in results if r.singular_values is not None]
        found.rope_energy = [r.rope_energy for r in results if r.rope_energy is not None] or None
    return new_config, new, found


def _report(name: str, config: ModelConfig, new_config: ModelConfig, layers: Layers) -> Report:
    residual = None
    if layers.errors is not None:
        residual = dict(zip(ERRORS, map(list, zip(*layers.errors)), strict=True))
    return Report(
        source=name,
        kv_lora_ranks=layers.ranks,
        widest=widest_latent(config),
        cache_bytes_per_token={
            "before": cache_bytes_per_token(config, 2),
            "after": cache_bytes_per_token(new_config, 2),
        },
        kept_energy=[
            kept_energy(values, rank)
            for values, rank in zip(layers.spectra, layers.ranks, strict=True)
        ],
        singular_values=[[float(f"{v:.5g}") for v in values] for values in layers.spectra],
        rope_energy=layers.rope_energy,
        residual_error=residual,
    )


def latent_config(config: ModelConfig, ranks: list[int]) -> ModelConfig:
    """The configuration of a multi-head model once its layers have latents of these widths."""
    values = {
        **config.to_dict(),
        "attention": "mla",
        "kv_lora_rank": max(ranks),
        "num_key_value_heads": None,
    }
    if len(set(ranks)) > 1:
        values["kv_lora_ranks"] = ranks
    if not config.beyond_gpt2:
        values["attention_out_bias"] = True  # which the bias of the values goes into
    if config.position_embedding_type == "rope":
        values["qk_rope_head_dim"] = config.head_dim or config.n_embd // config.n_head
    return ModelConfig(**values).resolved()


def factorise(
    config: ModelConfig, weights: Weights, moments: list[Moments] | None
) -> Iterator[Decomposition]:
    """Factors of every layer of a multi-head model, one layer at a time, so that few need be in
    memory.

    Args:
        moments: Of every layer; None without a text.
    """
    for i in range(config.n_layer):
        kv = weights[f"transformer.h.{i}.attn.c_attn.weight"][config.n_embd :]
        yield decompose(kv, moments[i] if moments else None)


def assemble(
    config: ModelConfig,
    weights: Weights,
    ranks: list[int],
    layers: Iterable[Decomposition],
    moments: list[Moments] | None,
) -> tuple[ModelConfig, Weights]:
    """Config and weights of the model whose layers have these factors, each cut to its rank.

    Args:
        config: Of the multi-head model, whose weights follow.
        moments: Of the calibration text, whose mean goes into the output biases; None without a
            text.
    """
    new_config = latent_config(config, ranks)
    new = {n: w for n, w in weights.items() if ".attn." not in n}
    for i, factors in enumerate(layers):
        attn = f"transformer.h.{i}.attn."
        old = {n.removeprefix(attn): w for n, w in weights.items() if n.startswith(attn)}
        mean = moments[i].mean if moments else None
        layer = to_latent(old, factors, ranks[i], config.n_head, mean)
        new |= {attn + n: w for n, w in layer.items()}
    return new_config, new
