"""Names, shapes and initial values of the model's tensors, for every backend."""

import zlib
from collections.abc import Mapping

import numpy as np

from mlx_mla.model.config import InitializerName, ModelConfig, TrainableName
from mlx_mla.model.train_config import TrainConfig


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in `model.safetensors` by name, in the order of the forward pass.

    Tensors with a counterpart in Hugging Face's GPT-2 have its name. Matrices are stored (out, in),
    as in nn.Linear. `config` must be resolved.
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

    # [gate | up] is one matrix, like [q | k | v].
    width_up = 2 * c.n_inner if c.activation_function == "swiglu" else c.n_inner
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        norm(f"{block}.ln_1")
        shapes.update(
            (f"{block}.attn.{name}", shape) for name, shape in c.attention_spec.tensors(i)
        )
        norm(f"{block}.ln_2")
        linear(f"{block}.mlp.c_fc", c.n_embd, width_up)
        linear(f"{block}.mlp.c_proj", c.n_inner, c.n_embd)
    norm("transformer.ln_f")
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.n_embd)
    return shapes


def not_finite(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Name of a tensor that holds NaN or infinity; None if there is none."""
    for name, values in tensors.items():
        # A sum needs no memory and a tenth of the time. If it is not finite, it may have
        # overflowed.
        with np.errstate(all="ignore"):
            total = values.sum()
        if not np.isfinite(total) and not np.isfinite(values).all():
            return name
    return None


def is_trained(name: str, trainable: TrainableName) -> bool:
    """True if --trainable lets a parameter change."""
    return trainable == "all" or ".attn." in name


def is_hidden_matrix(name: str, ndim: int) -> bool:
    """True if a parameter is a matrix of a block, which --optimizer muon orthogonalizes, rather
    than an embedding."""
    return ndim == 2 and ".h." in name


def moment_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every moment of the optimizer by its name on disk: `exp_avg.NAME` and
    `exp_avg_sq.NAME` of AdamW, `momentum_buffer.NAME` of Muon."""
    shapes = {}
    for name, shape in parameter_shapes(config.model).items():
        if is_trained(name, config.trainable):
            muon = config.optimizer == "muon" and is_hidden_matrix(name, len(shape))
            for moment in ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq"):
                shapes[f"{moment}.{name}"] = shape
    return shapes


def num_parameters(config: ModelConfig) -> int:
    """Number of parameters; a tied output head counts once."""
    return sum(int(np.prod(shape)) for shape in parameter_shapes(config).values())


def initial_weights(
    config: ModelConfig, seed: int, std: float = 0.02, initializer: InitializerName = "normal"
) -> dict[str, np.ndarray]:
    """Draw random float32 weights by name: N(0, std), or N(0, std / sqrt(2 n_layer)) for residual
    projections.

    Each tensor has its own random stream, seeded with the seed and the tensor's name. Its initial
    values therefore do not depend on the model's other tensors.

    Args:
        initializer: "normal" is GPT-2's initialization. With "fan_in", the std of a block's matrix
            is multiplied by sqrt(n_embd / inputs). W_up reads a latent narrower than n_embd; this
            makes its keys and values as large as those of a matrix that reads the residual stream.
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
