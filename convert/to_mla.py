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
    if config.attention == "mla":
        raise UserError("--to mla: the model's attention is MLA already; leave out --to mla")
    if rank is not None and budget is not None:
        raise UserError("--rank and --rank-budget exclude each other; leave one out")
    name, width = ("--rank-budget", budget) if rank is None else ("--rank", rank)
    widest, what = widest_latent(config), "all that there is"
    bound = f"{widest} ({what})"
    if not config.beyond_gpt2:
        bound = f"the model's n_embd, {widest} (exact)"
    if width is None:
        raise UserError(f"--to mla needs --rank R or --rank-budget R, from 1 to {bound}")
    if not 1 <= width <= widest:
        raise UserError(f"{name} must be from 1 to {bound}, not {width}")
    return Rank(width, rank is None)


def check_calibration(config: ModelConfig, method: Method | None, calibration: str | None) -> None:
    """UserError where a model needs a calibration text, or another method."""
    if not (beyond := config.beyond_gpt2):
        return
    what = f"with {' '.join(beyond)}"
    if method not in (None, "whitened"):
        raise UserError(f"--method {method} is for GPT-2's own attention, not for a model {what}")
    if calibration is None:
        raise UserError(f"--to mla needs --calibration TEXT for a model {what}")


def default_method(config: ModelConfig, calibration: Calibration | None) -> Method:
    """The method where none is asked for."""
    if config.beyond_gpt2:
        return "whitened"
    return "balanced" if calibration else "svd"


def calibration_defaults(config: ModelConfig) -> tuple[int, int]:
    """Tokens of a calibration window, and of all that are calibrated on."""
    return (
        (min(512, config.n_positions), 2**16) if config.beyond_gpt2 else (config.n_positions, 2**17)
    )


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
    if config.beyond_gpt2:
        assert calibration is not None
        return _layer_by_layer(name, config, weights, rank, calibration, console)
    moments: list[Moments] | None = None
    calibrated, before = None, 0.0
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
        ranks = share_ranks([x.singular_values for x in layers], rank.width, method)
    spectra: list[np.ndarray] = []

    def noted() -> Iterator[Decomposition]:
        for layer in layers:
            spectra.append(layer.singular_values)
            yield layer

    new_config, new_weights = assemble(config, weights, ranks, noted(), moments)
    report = _report(name, method, config, new_config, ranks, spectra)
    report.calibration = calibrated
    if calibration is not None:
        model = build_model(new_config, new_weights, calibration.device)
        after, _ = perplexity(model, calibration.text, calibration.held_out_tokens)
        report.perplexity = _perplexity(config, calibration.text, before, after, scored)
    return new_config, new_weights, report


def _layer_by_layer(
    name: str,
    config: ModelConfig,
    weights: Weights,
    rank: Rank,
    calibration: Calibration,
    console: Console,
) -> tuple[ModelConfig, Weights, Report]:
    """`convert_to_mla` for attention that is not GPT-2's."""
    from mlx_mla.backends.torch.load import build_model

    from .calibration import collect_moments, perplexity
    from .layerwise import convert_layers, source_weights
    from .rope import spectrum

    text, tokens = calibration.text, calibration.max_tokens
    windows = text.windows(tokens)
    model = build_model(config, weights, calibration.device)
    before, scored = perplexity(model, text, calibration.held_out_tokens)
    ranks = [rank.width] * config.n_layer
    if rank.shared:
        moments, _ = collect_moments(model, text, tokens, False, console)
        spectra = [
            spectrum(source_weights(model, i), m.mean, m.covariance) for i, m in enumerate(moments)
        ]
        ranks = share_ranks(spectra, rank.width, "whitened")
    new_config = latent_config(config, ranks)
    new = {n: w for n, w in weights.items() if ".attn." not in n}
    layers = []
    for i, layer in enumerate(convert_layers(model, new_config, windows, console)):
        new |= {f"transformer.h.{i}.attn.{n}": w for n, w in layer.weights.items()}
        layer.weights.clear()
        layers.append(layer)
    del model
    spectra = [layer.singular_values for layer in layers]
    report = _report(name, "whitened", config, new_config, ranks, spectra)
    report.calibration = {"text": text.name, "tokens": windows.size}
    if config.position_embedding_type == "rope":
        report.rope_energy = [layer.rope_energy for layer in layers]
    report.residual_error = {
        "before_refit": [layer.error_before_refit for layer in layers],
        "after_refit": [layer.error_after_refit for layer in layers],
    }
    model = build_model(new_config, new, calibration.device)
    after, _ = perplexity(model, text, calibration.held_out_tokens)
    report.perplexity = _perplexity(config, text, before, after, scored)
    return new_config, new, report


def _report(
    name: str,
    method: Method,
    config: ModelConfig,
    new_config: ModelConfig,
    ranks: list[int],
    spectra: list[np.ndarray],
) -> Report:
    return Report(
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
    )


def _perplexity(
    config: ModelConfig, text: "Text", before: float, after: float, tokens: int
) -> dict[str, float]:
    assert config.vocab_size
    masked = config.vocab_size - len(text.tokenizer)
    return {"before": before, "after": after, "tokens": tokens, "masked_rows": masked}


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
    if config.position_embedding_type == "rope":
        values["qk_rope_head_dim"] = config.head_dim or config.n_embd // config.n_head
    return ModelConfig.from_dict(values).resolved()


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
    new_config = latent_config(config, ranks)
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
