"""The forward pass of training in MLX, with activation checkpointing and a chunked loss that never
holds all logits."""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_mla.model.model_mlx import Block, Transformer, differentiable_mask

# A GPU sums the gradient of a token that occurs several times with atomics, in an order that
# varies; a CPU uses a fixed order. On a Mac, where both share memory, the CPU does this.
EMBEDDING_STREAM = mx.cpu if mx.metal.is_available() else None


def hidden_states(
    transformer: Transformer, ids_BL: mx.array, dtype: mx.Dtype, activation_checkpointing: int = 0
) -> mx.array:
    """Last hidden states (B, L, D) of token ids, without a cache.

    Args:
        transformer: The transformer. Its embeddings are float32, so their gradients are summed in
            float32.
        dtype: Type of the other weights and of the computation.
        activation_checkpointing: Keep activations only between groups of this many blocks and
            recompute the others in the backward pass (Chen et al., arXiv:1604.06174). 0: keep all.
    """
    # The gradient of a lookup is summed on the stream of the lookup.
    h = mx.take(transformer.wte.weight, ids_BL, axis=0, stream=EMBEDDING_STREAM)
    if "wpe" in transformer:
        h = h + transformer.wpe(mx.arange(ids_BL.shape[1]))
    h, latent = transformer.drop(h.astype(dtype)), None
    mask = differentiable_mask("causal", h.shape[1])
    if not activation_checkpointing:
        for block in transformer.h:
            h, latent = block(h, mask, latent=latent)
    else:
        for i in range(0, len(transformer.h), activation_checkpointing):
            h, latent = _checkpointed(
                transformer.h[i : i + activation_checkpointing], h, mask, latent
            )
    return transformer.ln_f(h)


def _checkpointed(
    blocks: Sequence[Block], h: mx.array, mask: Any, latent: Any
) -> tuple[mx.array, Any]:
    def run(parameters: list, h: mx.array, latent: Any) -> tuple[mx.array, Any]:
        # Each group has its own key, so its recomputation draws the same dropout masks.
        outer = _random_state()[:]
        _random_state()[:] = key
        for block, own in zip(blocks, parameters):
            block.update(own)
            h, latent = block(h, mask, latent=latent)
        _random_state()[:] = outer
        return h, latent

    _random_state()[:], key = mx.random.split(_random_state())
    return mx.checkpoint(run)([block.trainable_parameters() for block in blocks], h, latent)


def _random_state() -> mx.array:
    """MLX's current random state; every draw replaces the array."""
    return cast(mx.array, mx.random.state[0])  # type: ignore[index]


def head_loss(
    h_NLD: mx.array, w_VD: mx.array, y_NL: mx.array, chunk: int = 0, gradient: bool = False
) -> mx.array:
    """Summed cross-entropy of the head, in nats, float32.

    Args:
        h_NLD: Hidden states in the type of the computation.
        w_VD: The head's matrix, in the same type.
        chunk: Number of tokens whose logits are held at a time. 0: all.
        gradient: True if a gradient will be computed. It is then computed together with the loss,
            chunk by chunk, so no logits are stored or computed twice (as in Liger Kernel's fused
            linear cross-entropy, arXiv:2410.10989).
    """
    if not chunk or y_NL.size <= chunk:
        return _cross_entropy(h_NLD, w_VD, y_NL)
    h, y = h_NLD.reshape(-1, h_NLD.shape[-1]), y_NL.reshape(-1)
    pieces = [slice(i, i + chunk) for i in range(0, len(y), chunk)]
    if gradient:
        return _with_gradient(pieces)(h, w_VD, y)[0]
    total = mx.zeros(())
    for piece in pieces:
        total = total + _cross_entropy(mx.depends(h[piece], [total]), w_VD, y[piece])
    return total


def _cross_entropy(h: mx.array, w_VD: mx.array, y: mx.array) -> mx.array:
    return cross_entropy(h @ w_VD.T, y).sum()


def cross_entropy(logits: mx.array, y: mx.array) -> mx.array:
    """Cross-entropy of each token, in nats, float32, for logits (..., V) of any type."""
    if mx.default_device() == mx.cpu:  # GPUs' fused kernels sum in float32 as they read
        logits = logits.astype(mx.float32)
    return mx.fast.cross_entropy(logits, y)


_loss_and_gradients = mx.value_and_grad(_cross_entropy, argnums=(0, 1))


def _with_gradient(pieces: Sequence[slice]) -> Any:
    """Return a function of (h_ND, w_VD, y_N) that computes the summed loss and its gradients with
    respect to h and w."""

    @mx.custom_function
    def loss_and_gradients(
        h_ND: mx.array, w_VD: mx.array, y_N: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        total, dw_VD = mx.zeros(()), mx.zeros(w_VD.shape)
        dh: list[mx.array] = []
        for piece in pieces:
            # Without these dependencies, all chunks would start at once and hold all their logits.
            h = mx.depends(h_ND[piece], [total, dw_VD, *dh[-1:]])
            loss, (own, weight) = _loss_and_gradients(h, w_VD, y_N[piece])
            total, dw_VD = total + loss, dw_VD + weight
            dh.append(own)
        return total, mx.concatenate(dh), dw_VD

    @loss_and_gradients.vjp
    def _(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple[mx.array, mx.array, mx.array]:
        (h, w, y), scale, (_, dh, dw) = primals, cotangents[0], outputs
        return (scale * dh).astype(h.dtype), (scale * dw).astype(w.dtype), mx.zeros_like(y)

    return loss_and_gradients
