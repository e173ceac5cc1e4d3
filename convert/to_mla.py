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
    Method,
    MhaLayer,
    Moments,
    decompose,
    kept_energy,
    share_ranks,
    to_latent,
)
from .report import Report

if TYPE_CHECKING:
    import torch

    from .calibration import Text

Weights = dict[str, np.ndarray]


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
    if beyond := config.beyond_gpt2:
        raise UserError(
            f"--to mla needs GPT-2's own attention, and this model has {' '.join(beyond)}"
        )
    if rank is not None and budget is not None:
        raise UserError("--rank and --rank-budget exclude each other; leave one out")
    name, width = ("--rank-budget", budget) if rank is None else ("--rank", rank)
    if width is None:
        raise UserError(
            f"--to mla needs --rank R or --rank-budget R, from 1 to {config.n_embd} (exact)"
        )
    if not 1 <= width <= config.n_embd:
        raise UserError(
            f"{name} must be from 1 to the model's n_embd, {config.n_embd} (exact), not {width}"
        )
    return Rank(width, rank is None)


def convert_to_mla(
    name: str,
    config: ModelConfig,
    weights: Weights,
    rank: Rank,
    method: Method,
    calibration: Calibration | None,
    console: Console,
) -> tuple[ModelConfig, Weights, Report]:
    """Give every layer a latent.

    Args:
        name: What the source is called, for the report.
        config: Resolved; multi-head attention.
        weights: float32, in this project's layout.
        calibration: Needed by every method but "svd"; where there is one, perplexity is measured
            too, in PyTorch.
    """
    moments: list[Moments] | None = None
    calibrated = before = None
    if calibration is not None:
        from mlx_mla.backends.torch.load import build_model

        from .calibration import collect_moments, perplexity

        model = build_model(config, weights, calibration.device)
        if method != "svd":
            moments, tokens = collect_moments(
                model, calibration.text, calibration.max_tokens, method == "balanced", console
            )
            calibrated = {"text": calibration.text.name, "tokens": tokens}
        before, scored = perplexity(model, calibration.text, calibration.held_out_tokens)
        del model

    layers: Iterable[Decomposition] = factorise(config, weights, method, moments)
    ranks = [rank.width] * config.n_layer
    if rank.shared:
        layers = list(layers)
        ranks = share_ranks(layers, rank.width, method)
    spectra: list[np.ndarray] = []

    def noted() -> Iterator[Decomposition]:
        for layer in layers:
            spectra.append(layer.singular_values)
            yield layer

    new_config, new_weights = assemble(config, weights, ranks, noted(), moments)
    report = Report(
        source=name,
        method=method,
        kv_lora_ranks=ranks,
        n_embd=config.n_embd,
        cache_bytes_per_token={
            "before": cache_bytes_per_token(config, 2),
            "after": cache_bytes_per_token(new_config, 2),
        },
        kept_energy=[
            kept_energy(values, rank) for values, rank in zip(spectra, ranks, strict=True)
        ],
        singular_values=[[float(f"{v:.5g}") for v in values] for values in spectra],
        calibration=calibrated,
    )
    if calibration is not None:
        model = build_model(new_config, new_weights, calibration.device)
        after, _ = perplexity(model, calibration.text, calibration.held_out_tokens)
        assert config.vocab_size
        masked = config.vocab_size - len(calibration.text.tokenizer)
        report.perplexity = {
            "before": before,
            "after": after,
            "tokens": scored,
            "masked_rows": masked,
        }
    return new_config, new_weights, report


def factorise(
    config: ModelConfig, weights: Weights, method: Method, moments: list[Moments] | None
) -> Iterator[Decomposition]:
    """Factors of every layer of a multi-head model, one layer at a time, so that few need be in
    memory.

    Args:
        moments: Of every layer; None for "svd".
    """
    for i in range(config.n_layer):
        kv = weights[f"transformer.h.{i}.attn.c_attn.weight"][config.n_embd :]
        yield decompose(kv, method, moments[i] if moments else None)


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
    values = {**config.to_dict(), "attention": "mla", "kv_lora_rank": max(ranks)}
    if len(set(ranks)) > 1:
        values["kv_lora_ranks"] = ranks
    new_config = ModelConfig.from_dict(values).resolved()
    new = {n: w for n, w in weights.items() if ".attn." not in n}
    for i, factors in enumerate(layers):
        attn = f"transformer.h.{i}.attn"
        old = MhaLayer(
            c_attn=weights[f"{attn}.c_attn.weight"],
            c_attn_bias=weights.get(f"{attn}.c_attn.bias"),
            c_proj=weights[f"{attn}.c_proj.weight"],
            c_proj_bias=weights[f"{attn}.c_proj.bias"],
        )
        layer = to_latent(
            old, factors, ranks[i], config.n_head, moments[i].mean if moments else None
        )
        new[f"{attn}.c_attn.weight"] = layer.c_attn
        if layer.c_attn_bias is not None:
            new[f"{attn}.c_attn.bias"] = layer.c_attn_bias
        new[f"{attn}.kv_b_proj.weight"] = layer.kv_b_proj
        new[f"{attn}.c_proj.weight"], new[f"{attn}.c_proj.bias"] = layer.c_proj, layer.c_proj_bias
    return new_config, new
