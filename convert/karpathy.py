"""Checkpoints of nanoGPT, build-nanogpt, MLA-Transformer and minGPT, which form one family.

All store matrices as nn.Linear does. They differ as follows:

- nanoGPT (karpathy/nanoGPT, train.py): `model, optimizer, model_args, iter_num, ...`; exact GELU,
  optional biases.
- build-nanogpt (karpathy/build-nanogpt, train_gpt2.py): `model, config, step, val_loss`; tanh GELU.
- MLA-Transformer (Marques-079/MLA-Transformer): `step, model, optimizer, config`, or only the state
  dict; tanh GELU; latent attention as q_proj, c_proj (to the latent), k_from_c, v_from_c and
  c_proj_out.
- minGPT (karpathy/minGPT): only the state dict; tanh GELU; an untied head.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_mla.checkpoint import check_tensors
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.weights import parameter_shapes

from .foreign import (
    EMBEDDING,
    HEAD,
    ForeignCheckpoint,
    LazyTensor,
    Tensors,
    count_layers,
    is_mask,
    is_tied,
    resolved,
    stacked,
    zeros,
)
from .pickles import PickledConfig, open_pickle, state_dict

LATENT_PARTS = ("q_proj", "c_proj", "k_from_c", "v_from_c", "c_proj_out")


def read_checkpoint(path: Path, n_head: int | None) -> ForeignCheckpoint:
    """Read a `.pt` file of one of these projects.

    Args:
        path: The file.
        n_head: Number of heads, which a bare state dict does not record. None: n_embd / 64, as in
            every GPT-2.

    Raises:
        UserError: If the file has none of these formats, is damaged, or its tensors do not fit its
            settings.
    """
    values = open_pickle(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {_article(values)}, not a checkpoint of a known project")
    if "model_args" in values:
        settings, kind = values["model_args"], "nanoGPT"
    else:
        settings, kind = values.get("config"), "build-nanogpt"
    if isinstance(settings, PickledConfig):
        settings = vars(settings)
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError(
            f"{path}: the configuration is {_article(settings)}, not a mapping; it is damaged"
        )
    tensors = state_dict(values.get("model", values), path)
    tensors = {n: t for n, t in tensors.items() if not is_mask(n, t)}
    tied = is_tied(tensors)
    if tied:
        tensors.pop(HEAD, None)
    tables = [tensors.get(n) for n in (EMBEDDING, "transformer.wpe.weight")]
    if not all(t is not None and len(t.shape) == 2 for t in tables):
        raise UserError(
            f"{path}: has no transformer.wte.weight and wpe.weight; it is not a GPT-2 of a known "
            "project"
        )

    if "transformer.h.0.attn.k_from_c.weight" in tensors:
        return _latent(path, settings, tensors, n_head, tied)
    if settings is None and tied:
        raise UserError(
            f"{path}: a bare state dict does not record its heads and activation; give the whole "
            "checkpoint"
        )
    if settings is None:
        if n_head is None:
            raise UserError(
                f"{path}: a state dict of minGPT does not record its number of heads; give --n-head"
            )
        settings, kind = _sizes(tensors, n_head), "minGPT"
    return _multi_head(path, kind, settings, tensors, tied)


def _multi_head(
    path: Path, kind: str, settings: Mapping[str, Any], tensors: Tensors, tied: bool
) -> ForeignCheckpoint:
    bias = settings.get("bias", True)
    if not isinstance(bias, int):
        raise UserError(
            f"{path}: its bias is a value of type {type(bias).__name__}, not True or False"
        )
    activation = "gelu" if kind == "nanoGPT" else "gelu_new"
    config = _config(
        path,
        settings,
        attention="mha",
        attention_bias=bool(bias),
        activation_function=activation,
        tie_word_embeddings=tied,
    )
    shapes = parameter_shapes(config)
    check_tensors(
        path, tensors, {n: s for n, s in shapes.items() if bias or not n.endswith(".bias")}
    )
    # In our layout, only the projections that read x may lack a bias.
    tensors = {n: tensors[n] if n in tensors else zeros(s) for n, s in shapes.items()}
    folder = path.parent if kind == "nanoGPT" else None
    return ForeignCheckpoint(kind, path.name, config, tensors, folder)


def _latent(
    path: Path,
    settings: Mapping[str, Any] | None,
    tensors: Tensors,
    n_head: int | None,
    tied: bool,
) -> ForeignCheckpoint:
    down = tensors.get("transformer.h.0.attn.c_proj.weight")
    if down is None or len(down.shape) != 2:
        raise UserError(
            f"{path}: missing tensor transformer.h.0.attn.c_proj.weight, whose rows are the latent "
            "width"
        )
    rank, n_embd = down.shape
    if settings is None:
        if n_head is None and n_embd % 64:
            raise UserError(
                f"{path}: a bare state dict does not record its number of heads, and {n_embd} is "
                "not a multiple of 64; give --n-head"
            )
        settings = _sizes(tensors, n_head or n_embd // 64)
    elif n_head is not None:
        raise UserError(f"{path}: records its number of heads; leave out --n-head")
    config = _config(
        path,
        settings,
        attention="mla",
        kv_lora_rank=rank,
        attention_bias=False,
        tie_word_embeddings=tied,
    )
    shapes = parameter_shapes(config)
    check_tensors(path, tensors, _latent_shapes(config))
    out: Tensors = {n: tensors[n] for n in shapes if ".attn." not in n}
    for i in range(config.n_layer):
        attn = f"transformer.h.{i}.attn"
        part = {p: tensors[f"{attn}.{p}.weight"] for p in LATENT_PARTS}
        out |= {
            f"{attn}.c_attn.weight": stacked([part["q_proj"], part["c_proj"]]),
            f"{attn}.kv_b_proj.weight": _by_head(part["k_from_c"], part["v_from_c"], config.n_head),
            f"{attn}.c_proj.weight": part["c_proj_out"],
            f"{attn}.c_proj.bias": tensors[f"{attn}.c_proj_out.bias"],
        }
    return ForeignCheckpoint("MLA-Transformer", path.name, config, out)


def _sizes(tensors: Tensors, n_head: int) -> dict[str, int]:
    """The settings that follow from the shapes of a state dict."""
    rows, n_embd = tensors[EMBEDDING].shape
    return {
        "n_layer": count_layers(tensors, "transformer.h."),
        "n_head": n_head,
        "n_embd": n_embd,
        "block_size": tensors["transformer.wpe.weight"].shape[0],
        "vocab_size": rows,
    }


def _latent_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, R = config.n_embd, config.kv_lora_rank
    assert R
    shapes = {n: s for n, s in parameter_shapes(config).items() if ".attn." not in n}
    for i in range(config.n_layer):
        attn = f"transformer.h.{i}.attn"
        for name, shape in zip(LATENT_PARTS, ((D, D), (R, D), (D, R), (D, R), (D, D))):
            shapes[f"{attn}.{name}.weight"] = shape
        shapes[f"{attn}.c_proj_out.bias"] = (D,)
    return shapes


def _config(path: Path, settings: Mapping[str, Any], **known: Any) -> ModelConfig:
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if missing := [n for n in names if n not in settings]:
        raise UserError(
            f"{path}: the configuration lacks {', '.join(missing)}; it is not a checkpoint of a "
            "known project"
        )
    values = {"n_positions" if n == "block_size" else n: settings[n] for n in names}
    return resolved(path, **values, **known)


def _by_head(k: LazyTensor, v: LazyTensor, n_head: int) -> LazyTensor:
    """Rows of [k | v] head by head, as in `kv_b_proj`; k and v are (D, R)."""
    return stacked([k, v]).mapped(
        lambda w: w.reshape(2, n_head, -1, w.shape[1]).swapaxes(0, 1).reshape(w.shape)
    )


def _article(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
