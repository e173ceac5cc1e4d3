"""Multi-head attention as latent attention: the linear algebra, in float64.

Keys and values of a layer are [k | v] = A x + b with A = [Wk; Wv], (2D, D). A latent of width R is
a factorisation A ~ U V with V (R, D) and U (2D, R). Two constants cost nothing: what is added to
every key leaves the softmax as it is, and what is added to every value comes out of attention
unchanged, so it goes into the output bias. Hence both biases fold away, and only the error's spread
around its mean counts: the covariance of x, not its second moment.

    without a text   min |A - UV|
    with one         min E |g . (A - UV)(x - mean)|^2    g = gradient of the loss at [k | v], taken
                                                         as independent of x

The second is a truncated SVD of L A S, with S S^T = cov(x) and L^T L = E[g g^T]: the
Kronecker-factored form of the loss's second-order change (K-FAC, arXiv:1503.05671), in which keys
and values have one unit, the loss.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

RIDGE = 1e-5
"""Added to the covariance, relative to its mean variance: directions that the text never took are
not lost."""
GRADIENT_RIDGE = 0.5
"""The same for the gradients' second moment, which says what small errors do: where much is cut
errors are large, and count for themselves too (docs/diary.md has other values)."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """What calibration text says of the input of one attention layer."""

    mean: np.ndarray
    """(D,)"""
    covariance: np.ndarray
    """(D, D)"""
    gradient: np.ndarray | None = None
    """Second moment of the loss's gradient at [k | v], (2D, 2D)."""


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """All factors of one layer, the most important first; the first R are the best latent of width
    R."""

    up: np.ndarray
    """(2D, D)"""
    down: np.ndarray
    """(D, D); the whole up @ down is A."""
    singular_values: np.ndarray
    """(D,), in the units of the error."""


def decompose(kv: np.ndarray, moments: Moments | None) -> Decomposition:
    """Factorise A = [Wk; Wv], (2D, D), in the order of what matters.

    Args:
        moments: Of a text, with the gradient's; None without one.
    """
    A = kv.astype(np.float64)
    if moments is None:
        # A V V^T with the eigenvectors V of A^T A: faster than an SVD, and nothing is divided by
        # small values.
        energy, V = np.linalg.eigh(A.T @ A)
        return Decomposition(A @ V[:, ::-1], V[:, ::-1].T, np.sqrt(np.maximum(energy[::-1], 0)))
    assert moments.gradient is not None
    S, _ = root(moments.covariance, RIDGE)
    return weighted(A, S, root(moments.gradient, GRADIENT_RIDGE))


def weighted(A: np.ndarray, S: np.ndarray, roots: tuple[np.ndarray, np.ndarray]) -> Decomposition:
    """The factors U V of A that minimize |L (A - U V) S|.

    Args:
        S: Root of the covariance of what A reads.
        roots: L and its inverse.
    """
    L, L_inverse = roots
    B = L @ A
    # With orthonormal U, U U^T B is the best approximation of B under the weight S, whose inverse
    # is not needed.
    U, singular_values, _ = np.linalg.svd(B @ S, full_matrices=False)
    return Decomposition(L_inverse @ U, U.T @ B, singular_values)


def kept_energy(singular_values: np.ndarray, rank: int) -> float:
    """Share of the sum of squared singular values that a latent of this width keeps."""
    energy = np.cumsum(singular_values**2)
    return float(energy[rank - 1] / energy[-1]) if energy[-1] > 0 else 1.0


def share_ranks(spectra: list[np.ndarray], average: int, comparable: bool) -> list[int]:
    """A width for every layer, `average` in the mean, that loses the least error in all.

    Widths come in blocks of gcd(average, 32), as quantized caches and weights need multiples of 32,
    or of a quarter of that where it is the whole average.

    Args:
        spectra: Singular values of every layer.
        comparable: Their squares are changes of one loss, and count as they are; otherwise they
            count as shares of their layer's sum.
    """
    block, n = math.gcd(average, 32), len(spectra)
    if block == average:
        block = max(1, block // 4)
    gains = []
    for i, values in enumerate(spectra):
        energy = values**2
        if not comparable:
            energy = energy / (energy.sum() or 1.0)
        # Every layer gets one block, whatever it is worth: a latent needs some width.
        gains += [
            (float(energy[at : at + block].sum()), i)
            for at in range(block, len(energy) - block + 1, block)
        ]
    ranks = [block] * n
    # A layer's blocks have falling gains, so that the largest gains of all are a choice of first
    # blocks.
    for _, i in sorted(gains, key=lambda gain: -gain[0])[: n * average // block - n]:
        ranks[i] += block
    return ranks


def root(matrix: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square root of a positive matrix and its inverse, after adding a ridge."""
    matrix = matrix.astype(np.float64)
    scale = float(np.trace(matrix)) / len(matrix) or 1.0
    values, vectors = np.linalg.eigh(matrix)
    roots = np.sqrt(np.maximum(values, 0) + ridge * scale)
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def to_latent(
    layer: Mapping[str, np.ndarray],
    factors: Decomposition,
    rank: int,
    n_head: int,
    mean: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Replace a layer's keys and values by a latent of width `rank`.

    Args:
        layer: Weights of the multi-head attention by name within it; biases may be absent.
        mean: Mean of the layer's input, (D,): the values' mean error goes into the output bias.
            None: zero.

    Returns:
        float32 weights of the latent attention. With rank D they compute what the layer did, up to
        rounding.
    """
    c_attn, c_proj, bias = layer["c_attn.weight"], layer["c_proj.weight"], layer.get("c_attn.bias")
    D = len(c_proj)
    up, down = factors.up[:, :rank], factors.down[:rank]
    value_shift = np.zeros(D)
    if mean is not None:
        value_shift += (c_attn[2 * D :].astype(np.float64) - up[D:] @ down) @ mean
    by_head = np.stack([up[:D].reshape(n_head, -1, rank), up[D:].reshape(n_head, -1, rank)], axis=1)
    new = {
        "c_attn.weight": np.concatenate([c_attn[:D], down.astype(np.float32)]),
        "kv_b_proj.weight": by_head.reshape(2 * D, rank).astype(np.float32),
        "c_proj.weight": c_proj,
    }
    if bias is not None:
        value_shift += bias[2 * D :]
        new["c_attn.bias"] = np.concatenate([bias[:D], np.zeros(rank, np.float32)])
    shift = c_proj.astype(np.float64) @ value_shift
    new["c_proj.bias"] = (layer.get("c_proj.bias", 0) + shift).astype(np.float32)
    return new
