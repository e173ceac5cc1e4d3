"""The model's tensors by name and shape, and their first values; the same for every backend."""

import zlib
from collections.abc import Mapping

import numpy as np

from mlx_mla.model.config import InitializerName, ModelConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in `model.safetensors`, in the order of the forward pass.

    Names are those of Hugging Face's GPT-2 where a tensor has a counterpart there; matrices are
    stored (out, in), as nn.Linear does. `config` must be resolved.
    """
    c = config
    assert c.n_inner and c.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (c.vocab_size, c.n_embd)}
    if c.position_embedding_type == "learned":
        shapes["transformer.wpe.weight"] = (c.n_positions, c.n_embd)

    def linear(name: str, width_in: int, width_out: int) -> None:
        shapes[f"{name}.weight"] = (width_out, width_in)
        if c.mlp_bias:
            shapes[f"{name}.bias"] = (width_out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (c.n_embd,)
        if c.norm == "layer_norm":
            shapes[f"{name}.bias"] = (c.n_embd,)

    # [gate | up] in one matrix, as [q | k | v] are.
    width_up = 2 * c.n_inner if c.activation_function == "swiglu" else c.n_inner
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        norm(f"{block}.ln_1")
        shapes.update((f"{block}.attn.{name}", shape) for name, shape in c.kind.tensors(i))
        norm(f"{block}.ln_2")
        linear(f"{block}.mlp.c_fc", c.n_embd, width_up)
        linear(f"{block}.mlp.c_proj", c.n_inner, c.n_embd)
    norm("transformer.ln_f")
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.n_embd)
    return shapes


def not_finite(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Name of a tensor with a value that is NaN or infinite; None if there is none."""
    for name, values in tensors.items():
        # A sum takes no memory and a tenth of the time; where it overflows, it says nothing.
        with np.errstate(all="ignore"):
            total = values.sum()
        if not np.isfinite(total) and not np.isfinite(values).all():
            return name
    return None


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """Whether a parameter is a matrix of a block, which --optimizer muon orthogonalises: not an
    embedding."""
    return ndim == 2 and ".h." in name


def num_parameters(config: ModelConfig) -> int:
    """Parameters in all, a tied output head counted once."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def initial_weights(
    config: ModelConfig, seed: int, std: float = 0.02, initializer: InitializerName = "normal"
) -> dict[str, np.ndarray]:
    """Random weights, float32 by name: N(0, std), residual projections N(0, std / sqrt(2 n_layer)).

    Every tensor has its own random stream, drawn from the seed and its name, so its initial values
    do not depend on which other tensors the model has.

    Args:
        config: A resolved configuration.
        seed: Of all streams.
        std: Standard deviation.
        initializer: "normal" is GPT-2's. With "fan_in" a block's matrix gets sqrt(n_embd / inputs)
            times that std, so that W_up, which reads a latent narrower than n_embd, makes keys and
            values as large as a matrix that reads the residual stream does.
    """
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 1:
            is_gain = name.endswith("weight")
            weights[name] = (np.ones if is_gain else np.zeros)(shape, np.float32)
            continue
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        scale = std / np.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std
        if initializer == "fan_in" and is_hidden_matrix(name, len(shape)):
            scale *= np.sqrt(config.n_embd / shape[1])
        weights[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return weights
