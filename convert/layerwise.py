"""Latent attention layer after layer: each is fitted to what the converted layers before it give.

Two residual streams of the calibration text advance side by side, the source's and the converted
model's. A layer's closed form sees the converted model's input, and its output projection is then
refitted so that the stream after the attention is the source's again.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from mlx_mla.model.config import ModelConfig
from mlx_mla.model.model_torch import (
    LatentAttention,
    MLAGPT2Config,
    MLAGPT2LMHeadModel,
    MultiHeadAttention,
    rotate,
)

from .calibration import BATCH_TOKENS
from .rope import Source, closed_form, refit

Rotation = tuple[torch.Tensor, torch.Tensor] | None

REFIT_RIDGE = 0.1
"""Relative to the mean energy of what the projection reads; docs/diary.md has other values."""


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """A converted layer."""

    weights: dict[str, np.ndarray]
    """By name within the attention, float32."""
    rope_energy: float | None
    singular_values: np.ndarray
    error_before_refit: float
    error_after_refit: float
    """Of the stream after the attention on the calibration text: squared, relative to each token's
    stream, mean over tokens."""


@torch.no_grad()
def convert_layers(
    model: MLAGPT2LMHeadModel,
    config: ModelConfig,
    windows: np.ndarray,
    console: Console,
) -> Iterator[LayerResult]:
    """Convert every layer of a multi-head model.

    Beside the model, memory is two residual streams of the calibration text and two more tensors of
    their size, and O(n_embd^2).

    Args:
        model: The source, on any device.
        config: Resolved; of the converted model.
        windows: Token ids of the calibration text, (N, T).
    """
    ids = torch.tensor(windows, device=model.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    transformer = model.transformer
    rotation = transformer.rotation(positions)
    source = transformer.wte(ids)
    if transformer.wpe is not None:
        source = source + transformer.wpe(positions)
    ours = source.clone()
    latent_config = MLAGPT2Config(**config.to_dict())
    ranks = config.kv_lora_ranks or [config.kv_lora_rank or 0] * config.n_layer
    batches = [slice(b[0], b[-1] + 1) for b in _split(len(ids), BATCH_TOKENS // ids.shape[1])]
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for i, block in enumerate(bar.track(transformer.h, description="converting")):
            weights = source_weights(model, i)
            after = torch.empty_like(source)
            second, distances = Sum(), Sum()
            for b in batches:
                x = block.ln_1(source[b])
                after[b] = source[b] + block.attn(x, None, None, rotation)[0]
                if rotation is not None:
                    distances.add(_distances(block.attn, x, rotation))
                y = _with_one(block.ln_1(ours[b]).flatten(0, 1), weights.q.shape[1])
                second.add(y.T @ y)
            converted = closed_form(weights, second.total / ids.numel(), distances.total, ranks[i])
            attn = LatentAttention(latent_config, i).to(model.device)
            _set(attn.c_attn, np.concatenate([converted.query, converted.down]))
            assert attn.kv_b_proj is not None
            _set(attn.kv_b_proj, converted.up)
            joined = torch.cat(
                [_joined_heads(attn, block.ln_1(ours[b]), rotation) for b in batches]
            )
            errors = _refit(attn.c_proj, block.attn.c_proj, joined, after, ours, batches)
            for b in batches:
                ours[b] += attn.c_proj(joined[b])
                ours[b] += block.mlp(block.ln_2(ours[b]))
                source[b] = after[b] + block.mlp(block.ln_2(after[b]))
            yield LayerResult(
                {n: p.detach().cpu().numpy() for n, p in attn.named_parameters()},
                converted.rope_energy,
                converted.singular_values,
                *errors,
            )


class Sum:
    """A sum of matrices, in float64."""

    def __init__(self) -> None:
        self.total = np.zeros(())

    def add(self, t: torch.Tensor) -> None:
        self.total = self.total + _double(t)


def _refit(
    new: torch.nn.Linear,
    old: torch.nn.Linear,
    joined: torch.Tensor,
    after: torch.Tensor,
    ours: torch.Tensor,
    batches: list[slice],
) -> tuple[float, float]:
    """Set the output projection such that the converted stream becomes the source's.

    Each token's error counts relative to its stream, since the norms that read the stream divide by
    its size. The first token of a window has a stream hundreds of times as large as the others.

    Args:
        joined: What the projection reads, (N, T, H d).
        after: The source's stream after the attention, (N, T, D).
        ours: The converted model's before it.

    Returns:
        The squared relative error, with the old projection and with the new one.
    """
    gram, cross, missing = Sum(), Sum(), Sum()
    start = _matrix(old)
    for b in batches:
        stream = after[b].flatten(0, 1)
        size = torch.linalg.vector_norm(stream, dim=1, keepdim=True).clamp(min=1e-30)
        o = _with_one(joined[b].flatten(0, 1), start.shape[1]) / size
        target = (stream - ours[b].flatten(0, 1)) / size
        gram.add(o.T @ o)
        cross.add(target.T @ o)
        missing.add(target.square().sum())

    def error(W: np.ndarray) -> float:
        left = missing.total - 2 * (W * cross.total).sum() + ((W @ gram.total) * W).sum()
        return max(0.0, float(left) / ours[..., 0].numel())

    W = refit(gram.total, cross.total, start, REFIT_RIDGE)
    _set(new, W)
    return error(start), error(W)


def _joined_heads(attn: LatentAttention, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """What an attention gives its output projection, (N, T, H d)."""
    seen: list[torch.Tensor] = []
    handle = attn.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    attn(x, None, None, rotation)
    handle.remove()
    return seen[0]


def _split(n: int, size: int) -> Iterator[range]:
    size = max(1, size)
    return (range(at, min(at + size, n)) for at in range(0, n, size))


def source_weights(model: MLAGPT2LMHeadModel, layer: int) -> Source:
    """An attention layer's weights for the algebra."""
    attn, config = model.transformer.h[layer].attn, model.config
    q, k, v = np.split(_matrix(attn.c_attn), np.cumsum(attn.widths)[:2])
    theta = None
    if config.position_embedding_type == "rope":
        theta = config.rope_theta ** (-np.arange(0, attn.head_dim, 2) / attn.head_dim)
    return Source(q, k, v, _double(attn.c_proj.weight), config.n_head, theta)


def _distances(attn: MultiHeadAttention, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Attention that each head gives to each distance, summed over x's windows; (H, T)."""
    B, T, _ = x.shape
    q, k, _ = (
        a.view(B, T, -1, attn.head_dim).transpose(1, 2)
        for a in attn.c_attn(x).split(attn.widths, dim=-1)
    )
    assert rotation is not None
    q, k = rotate(q, rotation), rotate(k, rotation)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * attn.scale
    scores += torch.full((T, T), float("-inf"), device=x.device).triu(1)
    attention = scores.softmax(-1).sum(0)
    at = torch.arange(T, device=x.device)
    distance = (at[:, None] - at).clamp(min=0).flatten()  # the future gets no attention
    sums = torch.zeros(len(attention), T, device=x.device)
    return sums.index_add_(1, distance, attention.flatten(1))


def _set(linear: torch.nn.Linear, matrix: np.ndarray) -> None:
    """Give a module a matrix, whose last column is the bias if it has one."""
    width = linear.in_features
    assert matrix.shape == (linear.out_features, width + (linear.bias is not None)), matrix.shape
    linear.weight.copy_(torch.from_numpy(matrix[:, :width]))
    if linear.bias is not None:
        linear.bias.copy_(torch.from_numpy(matrix[:, width]))


def _matrix(linear: torch.nn.Linear) -> np.ndarray:
    """A projection in float64, with its bias, if any, as a last column."""
    w = _double(linear.weight)
    return w if linear.bias is None else np.column_stack([w, _double(linear.bias)])


def _with_one(x: torch.Tensor, width: int) -> torch.Tensor:
    """x with a constant 1 at its end if it is to be one wider."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if width > x.shape[-1] else x


def _double(t: torch.Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()
