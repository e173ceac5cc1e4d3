"""The forward pass of training in PyTorch, with activation checkpointing and a chunked loss that
never holds all logits."""

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlx_mla.model.model_torch import MLAGPT2Model


def hidden_states(
    transformer: MLAGPT2Model, ids_BL: torch.Tensor, activation_checkpointing: int = 0
) -> torch.Tensor:
    """Last hidden states (B, L, D) of token ids, without a cache.

    Args:
        activation_checkpointing: Keep activations only between groups of this many blocks and
            recompute the others in the backward pass (Chen et al., arXiv:1604.06174). 0: keep all.
    """
    h = look_up(transformer.wte.weight, ids_BL, one_order=ids_BL.device.type == "mps")
    if not activation_checkpointing:
        hidden: torch.Tensor = transformer(inputs_embeds=h)[0]
        return hidden
    positions = torch.arange(ids_BL.shape[1], device=ids_BL.device)[None]
    rotation = transformer.rotation(positions)
    if transformer.wpe is not None:
        h = h + transformer.wpe(positions)
    h, latent = transformer.drop(h), None

    def run(h: torch.Tensor, latent: Any, first: int) -> tuple[torch.Tensor, Any]:
        for block in transformer.h[first : first + activation_checkpointing]:
            h, latent = block(h, None, None, rotation, latent)
        return h, latent

    for first in range(0, len(transformer.h), activation_checkpointing):
        h, latent = checkpoint(run, h, latent, first, use_reentrant=False)
    last: torch.Tensor = transformer.ln_f(h)
    return last


def look_up(w_VD: torch.Tensor, ids_BL: torch.Tensor, one_order: bool) -> torch.Tensor:
    """Embeddings (B, L, D) of token ids.

    Args:
        one_order: True to look up on the CPU, which sums the gradient of a token that occurs
            several times in a fixed order. MPS sums it with atomics, in an order that varies.
    """
    if one_order:
        return F.embedding(ids_BL.cpu(), w_VD.cpu()).to(w_VD.device)
    return F.embedding(ids_BL, w_VD)


def head_loss(
    h_BLD: torch.Tensor, w_VD: torch.Tensor, y_N: torch.Tensor, chunk: int = 0
) -> torch.Tensor:
    """Summed cross-entropy of the head, in nats, float32.

    Args:
        w_VD: The head's matrix.
        y_N: Targets, N = B L.
        chunk: Number of tokens whose logits are held at a time. The gradient is computed together
            with the loss, chunk by chunk, so no logits are stored or computed twice (as in Liger
            Kernel's fused linear cross-entropy, arXiv:2410.10989). 0: all.
    """
    h_ND = h_BLD.flatten(0, 1)
    if not chunk or len(y_N) <= chunk:
        return F.cross_entropy(F.linear(h_ND, w_VD).float(), y_N, reduction="sum")
    if not torch.is_grad_enabled():
        pieces = zip(h_ND.split(chunk), y_N.split(chunk))
        return torch.stack(
            [F.cross_entropy(F.linear(h, w_VD).float(), y, reduction="sum") for h, y in pieces]
        ).sum()
    total: torch.Tensor = _ChunkedLoss.apply(h_ND, w_VD, y_N, chunk)
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: torch.Tensor, w_VD: torch.Tensor, y_N: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        total = torch.zeros((), device=h_ND.device)
        dh_ND, dw_VD = torch.empty_like(h_ND), None
        if ctx.needs_input_grad[1]:
            dw_VD = torch.zeros_like(w_VD, dtype=torch.float32)
        for h, y, dh in zip(h_ND.split(chunk), y_N.split(chunk), dh_ND.split(chunk)):
            logits = F.linear(h, w_VD)
            log_p = torch.log_softmax(logits.float(), -1)
            total += F.nll_loss(log_p, y, reduction="sum")
            # d loss / d logits = softmax - one-hot, in the type of the matrix product.
            d = log_p.exp_()
            d[torch.arange(len(y), device=y.device), y] -= 1
            d = d.to(logits.dtype)
            dh.copy_(d @ w_VD.to(d.dtype))
            if dw_VD is not None:
                dw_VD += d.T @ h.to(d.dtype)
        ctx.save_for_backward(dh_ND, dw_VD)
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple:
        dh_ND, dw_VD = ctx.saved_tensors
        return scale * dh_ND, None if dw_VD is None else scale * dw_VD, None, None
