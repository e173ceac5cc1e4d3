"""Latent attention layer after layer: each is fitted to what the converted layers before it give.

Two residual streams of the calibration text advance side by side, the source's and the converted
model's. A layer starts from a closed form; then all of its matrices are fitted so that the stream
after the attention is the source's again, with no pass through any other layer.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

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

from .calibration import BATCH_TOKENS, double
from .rope import Source, closed_form, refit

Rotation = tuple[torch.Tensor, torch.Tensor] | None

REFIT_RIDGE = 0.1
"""Relative to the mean energy of what the projection reads; docs/diary.md has other values."""
FIT_PASSES = 4
"""Times that each layer's fit reads the calibration text."""
FIT_RATE = 0.015
"""Learning rate of the fit, as a share of a matrix's root mean square; docs/diary.md has other
values."""


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """A converted layer."""

    weights: dict[str, np.ndarray]
    """By name within the attention, float32."""
    singular_values: np.ndarray | None
    rope_energy: float | None
    """Both of `closed_form`; None for a layer that started from given weights."""
    errors: tuple[float, float, float]
    """Of the stream after the attention on the calibration text: squared, relative to each token's
    stream, mean over tokens. At the start, with the output projection refitted, and after the
    fit."""


@torch.no_grad()
def convert_layers(
    model: MLAGPT2LMHeadModel,
    config: ModelConfig,
    windows: np.ndarray,
    start: Sequence[Mapping[str, np.ndarray]] | None,
    console: Console,
) -> Iterator[LayerResult]:
    """Convert every layer of a multi-head model.

    Beside the model, memory is two residual streams of the calibration text and two more tensors of
    their size, and O(n_embd^2).

    Args:
        model: The source, on any device.
        config: Resolved; of the converted model.
        windows: Token ids of the calibration text, (N, T).
        start: For each layer, weights of the latent attention by name. None: `closed_form`, on the
            stream that the converted layers give.
    """
    model.requires_grad_(False)
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
    rows = max(1, BATCH_TOKENS // ids.shape[1])
    batches = [slice(at, at + rows) for at in range(0, len(ids), rows)]
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for i, block in enumerate(bar.track(transformer.h, description="converting")):
            after = torch.empty_like(source)
            for b in batches:
                after[b] = source[b] + block.attn(block.ln_1(source[b]), None, None, rotation)[0]
            attn, closed = LatentAttention(latent_config, i).to(model.device).eval(), None
            if start is None:
                weights = source_weights(model, i)
                second, distances = Sum(), Sum()
                for b in batches:
                    if rotation is not None:
                        distances.add(_distances(block.attn, block.ln_1(source[b]), rotation))
                    y = _with_one(block.ln_1(ours[b]).flatten(0, 1), weights.q.shape[1])
                    second.add(y.T @ y)
                closed = closed_form(weights, second.total / ids.numel(), distances.total, ranks[i])
                _set(attn.c_attn, np.concatenate([closed.query, closed.down]))
                assert attn.kv_b_proj is not None
                _set(attn.kv_b_proj, closed.up)
                _set(attn.c_proj, _matrix(block.attn.c_proj))
            else:
                attn.load_state_dict({n: torch.from_numpy(w) for n, w in start[i].items()})
            layer = _Layer(attn, block.ln_1, ours, after, rotation, batches)
            first, refitted = layer.refit()
            attn, fitted = layer.fitted(refitted, seed=i)
            for b in batches:
                ours[b] += attn(block.ln_1(ours[b]), None, None, rotation)[0]
                ours[b] += block.mlp(block.ln_2(ours[b]))
                source[b] = after[b] + block.mlp(block.ln_2(after[b]))
            yield LayerResult(
                {n: p.detach().cpu().numpy() for n, p in attn.named_parameters()},
                None if closed is None else closed.singular_values,
                None if closed is None else closed.rope_energy,
                (first, refitted, fitted),
            )


class Sum:
    """A sum of matrices, in float64."""

    def __init__(self) -> None:
        self.total = np.zeros(())

    def add(self, t: torch.Tensor) -> None:
        self.total = self.total + double(t)


@dataclasses.dataclass
class _Layer:
    """A layer's latent attention, and the streams that it is to lead from one to the other."""

    attn: LatentAttention
    norm: torch.nn.Module
    """What the attention reads the stream through."""
    ours: torch.Tensor
    """The converted model's stream before the attention, (N, T, D)."""
    after: torch.Tensor
    """The source's stream after it."""
    rotation: Rotation
    batches: list[slice]
    """Of the windows."""

    def _target(self, windows: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention should add, (n, T, D), and the size that its error is relative to, (n,
        T, 1).

        The norms that read the stream divide by its size. The first token of a window has a stream
        hundreds of times as large as the others.
        """
        after = self.after[windows]
        size = torch.linalg.vector_norm(after, dim=-1, keepdim=True).clamp(min=1e-30)
        return after - self.ours[windows], size

    def refit(self) -> tuple[float, float]:
        """Set the output projection, in closed form, such that the stream becomes the source's.

        Returns:
            The squared relative error, mean over tokens, with the old projection and the new one.
        """
        gram, cross, missing = Sum(), Sum(), Sum()
        start = _matrix(self.attn.c_proj)
        for b in self.batches:
            target, size = (t.flatten(0, 1) for t in self._target(b))
            joined = _joined_heads(self.attn, self.norm(self.ours[b]), self.rotation)
            o = _with_one(joined.flatten(0, 1), start.shape[1]) / size
            target = target / size
            gram.add(o.T @ o)
            cross.add(target.T @ o)
            missing.add(target.square().sum())

        def error(W: np.ndarray) -> float:
            left = missing.total - 2 * (W * cross.total).sum() + ((W @ gram.total) * W).sum()
            return max(0.0, float(left) / self.ours[..., 0].numel())

        W = refit(gram.total, cross.total, start, REFIT_RIDGE)
        _set(self.attn.c_proj, W)
        return error(start), error(W)

    @torch.enable_grad()
    def fitted(self, error: float, seed: int) -> tuple[LatentAttention, float]:
        """The attention with all its matrices fitted by Adam to that same end, and its error; as
        it is if that is lower.

        Args:
            error: Its error as it is.
            seed: Of the order of the windows.
        """
        before = copy.deepcopy(self.attn)
        linears = [m for m in self.attn.modules() if isinstance(m, torch.nn.Linear)]
        rates = [FIT_RATE * float(m.weight.detach().square().mean().sqrt()) for m in linears]
        optimizer = torch.optim.Adam(
            [{"params": list(m.parameters())} for m in linears], betas=(0.9, 0.95)
        )
        rows, generator = self.batches[0].stop, torch.Generator().manual_seed(seed)
        order = [torch.randperm(len(self.ours), generator=generator) for _ in range(FIT_PASSES)]
        device = self.ours.device
        steps = [part.to(device) for one in order for part in one.split(rows)]
        for step, part in enumerate(steps):
            decay = 0.5 + 0.5 * math.cos(math.pi * step / len(steps))
            warm_up = min(1.0, (step + 1) / (1 + 0.1 * len(steps)))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * decay * warm_up
            target, size = self._target(part)
            output = self.attn(self.norm(self.ours[part]), None, None, self.rotation)[0]
            optimizer.zero_grad()
            ((output - target) / size).square().sum(-1).mean().backward()
            optimizer.step()
        with torch.no_grad():
            _, after = self.refit()
        return (self.attn, after) if after < error else (before, error)


def _joined_heads(attn: LatentAttention, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """What an attention gives its output projection, (N, T, H d)."""
    seen: list[torch.Tensor] = []
    handle = attn.c_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    attn(x, None, None, rotation)
    handle.remove()
    return seen[0]


def source_weights(model: MLAGPT2LMHeadModel, layer: int) -> Source:
    """An attention layer's weights for the algebra."""
    attn, config = model.transformer.h[layer].attn, model.config
    q, k, v = np.split(_matrix(attn.c_attn), np.cumsum(attn.widths)[:2])
    theta = None
    if config.position_embedding_type == "rope":
        theta = config.rope_theta ** (-np.arange(0, attn.head_dim, 2) / attn.head_dim)
    return Source(q, k, v, double(attn.c_proj.weight), config.n_head, theta)


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
    w = double(linear.weight)
    return w if linear.bias is None else np.column_stack([w, double(linear.bias)])


def _with_one(x: torch.Tensor, width: int) -> torch.Tensor:
    """x with a constant 1 at its end if it is to be one wider."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if width > x.shape[-1] else x
