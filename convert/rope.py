"""Attention with RoPE as latent attention: the linear algebra of one layer, in float64.

RoPE multiplies frequency i of a key at position s by exp(j s theta_i), so the keys of G groups are,
frequency by frequency, a complex vector of G entries that turns by one phase. Any complex linear
map over the groups commutes with that. docs/convert.md has the formulas.

Shapes: D n_embd, H n_head, G num_key_value_heads, d head_dim, R latent width. Matrices are (out,
E), where E is D, or D + 1 if the layer has biases: its input then ends with a constant 1. A key's
bias thus rotates with the shared key.
"""

import dataclasses

import numpy as np

from .latent import root, weighted

GAMMA = 2.0
"""Weight of the values' error against the keys', both relative to their size."""
LATENT_RIDGE = 1e-6
WEIGHT_RIDGE = 1e-4


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights of an attention layer."""

    q: np.ndarray
    """(H d, E)"""
    k: np.ndarray
    """(G d, E)"""
    v: np.ndarray
    """(G d, E)"""
    out: np.ndarray
    """(D, H d)"""
    n_head: int
    theta: np.ndarray | None
    """RoPE's frequencies, (d/2,); None without RoPE."""

    @property
    def head_dim(self) -> int:
        return len(self.q) // self.n_head

    @property
    def n_group(self) -> int:
        return len(self.k) // self.head_dim


@dataclasses.dataclass(frozen=True)
class SharedKey:
    """Keys and queries of a layer, split into a part with RoPE and one without."""

    key: np.ndarray
    """(d, E), the key with RoPE that all heads share."""
    query: np.ndarray
    """(H d, E), the heads' queries for it."""
    rest: np.ndarray
    """(G d, E), what is left of the keys."""
    rest_query: np.ndarray
    """(H d, E), the heads' queries for that, which hold RoPE's mean effect."""
    kept: float
    """Share of the weighted energy in the shared key."""


def shared_key(source: Source, second: np.ndarray, distances: np.ndarray) -> SharedKey:
    """Split the keys so that as much as possible is in one key with RoPE.

    Args:
        second: Second moment of the layer's input, (E, E).
        distances: Attention that each head gives to each distance, (H, T).
    """
    assert source.theta is not None
    n_head, n_group = source.n_head, source.n_group
    q, k = to_complex(source.q, n_head), to_complex(source.k, n_group)
    energy = np.einsum("hie,ef,hif->hi", q, second, q.conj(), optimize=True).real
    weight = np.sqrt(energy.reshape(n_group, n_head // n_group, -1).sum(1))
    weight += 1e-12 + 1e-6 * weight.max()
    seen = weight[..., None] * k
    covariance = np.einsum("gie,ef,hif->igh", seen, second, seen.conj(), optimize=True)
    values, vectors = np.linalg.eigh(covariance)
    u = vectors[..., -1].T
    shared = np.einsum("gi,gie->ie", u.conj(), seen)
    query = q * np.repeat(u.conj() / weight, n_head // n_group, axis=0)[..., None]
    rest = k - (u / weight)[..., None] * shared
    if np.linalg.norm(rest) < 1e-9 * np.linalg.norm(k):
        rest *= 0  # rounding, which must not be scaled up
    alpha = mean_phase(distances, source.theta)
    return SharedKey(
        key=to_real(shared[None]),
        query=to_real(query),
        rest=to_real(rest),
        rest_query=to_real(alpha.conj()[..., None] * q),
        kept=float(values[:, -1].sum() / max(values.sum(), 1e-300)),
    )


def mean_phase(distances: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The mean of exp(-j t theta_i) over distances t under the attention of each head; complex (H,
    d/2)."""
    weights = distances / distances.sum(1, keepdims=True)
    return weights @ np.exp(-1j * np.arange(distances.shape[1])[:, None] * theta)


def to_complex(matrix: np.ndarray, n: int) -> np.ndarray:
    """(n d, E), RoPE's pairs (2i, 2i + 1), as complex (n, d/2, E)."""
    pairs = matrix.reshape(n, -1, 2, matrix.shape[1])
    return pairs[:, :, 0] + 1j * pairs[:, :, 1]


def to_real(matrix: np.ndarray) -> np.ndarray:
    """The inverse of `to_complex`."""
    return np.stack([matrix.real, matrix.imag], axis=2).reshape(-1, matrix.shape[-1])


def error_weight(
    source: Source, keys: np.ndarray, queries: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """How much errors of [keys without RoPE | values] count, (2 G d, 2 G d).

    A key's error counts as it changes scores (the second moment of the queries), a value's as it
    changes the output (W_o' W_o); each relative to the size of what the layer has, the values times
    GAMMA squared.

    Args:
        keys: (G d, E)
        queries: What reads them, (H d, E).
    """
    d, n_group = source.head_dim, source.n_group
    outputs = source.out.reshape(len(source.out), source.n_head, d)
    weight = np.zeros((2, n_group, d, 2, n_group, d))
    per_group = source.n_head // n_group
    by_head = queries.reshape(source.n_head, d, -1)
    for g in range(n_group):
        heads = range(g * per_group, (g + 1) * per_group)
        key = sum(by_head[h] @ second @ by_head[h].T for h in heads)
        value = sum(outputs[:, h].T @ outputs[:, h] for h in heads)
        for at, block in ((0, key), (1, value)):
            ridge = WEIGHT_RIDGE * np.trace(block) / d
            weight[at, g, :, at, g] = block + ridge * np.eye(d)
    flat = weight.reshape(2, n_group * d, 2, n_group * d)
    for at, matrix in ((0, keys), (1, source.v)):
        size = float(np.sum((matrix @ second @ matrix.T) * flat[at, :, at]))
        flat[at, :, at] *= (GAMMA**2 if at else 1.0) / size if size > 0 else 0.0
    return flat.reshape(2 * n_group * d, -1)


@dataclasses.dataclass(frozen=True)
class Converted:
    """Weights of the latent attention that replaces a layer, its output projection aside."""

    query: np.ndarray
    """(H (d + P), E), each head's rows [without RoPE | with RoPE]; P is d, or 0 without RoPE."""
    down: np.ndarray
    """(R + P, E), rows [latent | shared key]."""
    up: np.ndarray
    """(H 2 d, R), each head's key rows, then its value rows."""
    rope_energy: float | None
    """Share of the keys' weighted energy in the shared key; None without RoPE."""
    singular_values: np.ndarray


def closed_form(source: Source, second: np.ndarray, distances: np.ndarray, rank: int) -> Converted:
    """Split off the shared key, and factorise what is left of the keys with the values.

    Args:
        second: Second moment of the layer's input, (E, E).
        distances: Attention that each head gives to each distance, (H, T).
    """
    d, n_head, n_group = source.head_dim, source.n_head, source.n_group
    split = None if source.theta is None else shared_key(source, second, distances)
    keys, queries = (source.k, source.q) if split is None else (split.rest, split.rest_query)
    keys = without_constant(keys, len(source.out))
    roots = root(error_weight(source, keys, queries, second), 1e-10)
    A = np.concatenate([keys, source.v])
    factors = weighted(A, root(second, LATENT_RIDGE)[0], roots)
    up, down = factors.up[:, :rank], factors.down[:rank]
    # Latents of unit mean square.
    scale = np.sqrt(np.trace(down @ second @ down.T) / rank) or 1.0
    up, down = up * scale, down / scale
    by_group = up.reshape(2, n_group, d, rank).repeat(n_head // n_group, axis=1)
    query, kept = source.q.reshape(n_head, d, -1), None
    if split is not None:
        parts = [m.reshape(n_head, d, -1) for m in (split.rest_query, split.query)]
        # Scores are divided by the root of a query's width, now twice the source's.
        query = np.concatenate(parts, axis=1) * np.sqrt(2)
        down, kept = np.concatenate([down, split.key]), split.kept
    return Converted(
        query=query.reshape(-1, query.shape[-1]),
        down=down,
        up=by_group.swapaxes(0, 1).reshape(-1, rank),
        rope_energy=kept,
        singular_values=factors.singular_values,
    )


def spectrum(source: Source, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The singular values of the factors that the source's own input gives, RoPE's mean effect
    aside.

    Args:
        mean, covariance: Of the layer's input, (D,) and (D, D).
    """
    if source.q.shape[1] > len(mean):  # the constant input
        mean = np.append(mean, 1.0)
        covariance = np.pad(covariance, (0, 1))
    second = covariance + np.outer(mean, mean)
    at_zero = np.ones((source.n_head, 1))
    return closed_form(source, second, at_zero, 1).singular_values


def refit(gram: np.ndarray, cross: np.ndarray, start: np.ndarray, ridge: float) -> np.ndarray:
    """The W that minimizes the error of W o for a target plus ridge * mean energy * |W - start|^2.

    Args:
        gram: (F, F), sum of o o^T over tokens.
        cross: (D, F), sum of target o^T.
        start: (D, F)
    """
    scale = float(np.trace(gram)) / len(gram) or 1.0
    missing = cross - start @ gram
    return start + np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), missing.T).T


def without_constant(keys: np.ndarray, width: int) -> np.ndarray:
    """Keys without RoPE and without their bias, which adds the same to all scores of a query."""
    return np.concatenate([keys[:, :width], 0 * keys[:, width:]], axis=1)
