"""The model once more, in numpy and float64, written from the formulas for clarity alone."""

import numpy as np

from mlx_mla.model.config import ModelConfig


def norm(x, weights, name, c):
    gain, eps = weights[f"{name}.weight"], c.layer_norm_epsilon
    if c.norm == "rms_norm":
        return rms_norm(x, gain, eps)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * gain + weights[f"{name}.bias"]


def rms_norm(x, gain, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def rope(x, theta):
    """Rotate pairs (2i, 2i+1) of x (T, width) by position * theta^(-2i / width)."""
    T, width = x.shape
    angle = np.arange(T)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    even, odd = x[:, ::2], x[:, 1::2]
    out = np.empty_like(x)
    out[:, ::2] = even * np.cos(angle) - odd * np.sin(angle)
    out[:, 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return out


def head(q, k, v):
    scores = q @ k.T / np.sqrt(q.shape[-1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def attention(x, weights, name, c: ModelConfig, shared=None):
    """Output (T, D), and the latent and RoPE key for a layer that has none of its own.

    Args:
        shared: That latent and key, for such a layer; None for one with its own.
    """
    width = c.head_dim or c.n_embd // c.n_head
    if c.attention == "mha":
        kv_heads = c.num_key_value_heads or c.n_head
        cuts = [c.n_head * width, (c.n_head + kv_heads) * width]
        q, k, v = np.split(linear(x, weights, f"{name}.c_attn"), cuts, axis=-1)
        q, k, v = (a.reshape(len(x), -1, width).transpose(1, 0, 2) for a in (q, k, v))
        if c.position_embedding_type == "rope":
            q, k = ([rope(one, c.rope_theta) for one in a] for a in (q, k))
        of = [h * kv_heads // c.n_head for h in range(c.n_head)]  # a query head's keys and values
        heads = [head(q[h], k[g], v[g]) for h, g in enumerate(of)]
        return linear(np.concatenate(heads, -1), weights, f"{name}.c_proj"), None
    P, V = c.qk_rope_head_dim, c.v_head_dim
    q_rows = c.q_lora_rank or c.n_head * (width + P)
    q, down = np.split(linear(x, weights, f"{name}.c_attn"), [q_rows], axis=-1)
    if shared is None:
        R = down.shape[1] - P
        latent, k_rope = down[:, :R], rope(down[:, R:], c.rope_theta)
        if c.latent_norm:
            gain = weights[f"{name}.kv_a_layernorm.weight"]
            latent = rms_norm(latent, gain, c.layer_norm_epsilon)
        shared = latent, k_rope
    latent, k_rope = shared
    if c.q_lora_rank:
        if c.latent_norm:
            q = rms_norm(q, weights[f"{name}.q_a_layernorm.weight"], c.layer_norm_epsilon)
        q = linear(q, weights, f"{name}.q_b_proj")
    if c.attention_k_eq_v:
        up = np.stack([np.concatenate([np.eye(width)] * 2)] * c.n_head)
    else:
        up = weights[f"{name}.kv_b_proj.weight"].reshape(c.n_head, width + V, -1)
    heads = []
    for h in range(c.n_head):
        q_h = q[:, h * (width + P) : (h + 1) * (width + P)]
        q_h = np.concatenate([q_h[:, :width], rope(q_h[:, width:], c.rope_theta)], -1)
        k_h = np.concatenate([latent @ up[h, :width].T, k_rope], -1)
        heads.append(head(q_h, k_h, latent @ up[h, width:].T))
    return linear(np.concatenate(heads, -1), weights, f"{name}.c_proj"), shared


def gelu(x, kind):
    if kind == "gelu_new":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    from math import erf

    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def logits(ids, weights, c: ModelConfig):
    """Logits (T, vocab_size) of token ids (T,), in float64."""
    weights = {k: v.astype(np.float64) for k, v in weights.items()}
    x = weights["transformer.wte.weight"][ids]
    if c.position_embedding_type == "learned":
        x = x + weights["transformer.wpe.weight"][: len(ids)]
    shared = None
    for i in range(c.n_layer):
        h = f"transformer.h.{i}"
        x1 = norm(x, weights, f"{h}.ln_1", c)
        own = i < c.n_layer - c.num_kv_shared_layers
        attended, shared = attention(x1, weights, f"{h}.attn", c, None if own else shared)
        x = x + attended
        y = linear(norm(x, weights, f"{h}.ln_2", c), weights, f"{h}.mlp.c_fc")
        if c.activation_function == "swiglu":
            gate, up = y[:, : c.n_inner], y[:, c.n_inner :]
            y = gate / (1 + np.exp(-gate)) * up
        else:
            y = gelu(y, c.activation_function)
        x = x + linear(y, weights, f"{h}.mlp.c_proj")
    head = "transformer.wte.weight" if c.tie_word_embeddings else "lm_head.weight"
    return norm(x, weights, "transformer.ln_f", c) @ weights[head].T
