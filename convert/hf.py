"""Read and write Hugging Face's GPT-2 (`GPT2LMHeadModel`), and what all of their folders share.

GPT-2's Conv1D matrices are stored (in, out), the transpose of ours. Its names are the same as ours
(transformers, modeling_gpt2.py).
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy bfloat16, which safetensors then reads)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerFast

from mlx_mla.checkpoint import INDEX, WEIGHTS, check_tensors, in_type, shards
from mlx_mla.data.tokenizer import end_ids
from mlx_mla.errors import UserError
from mlx_mla.files import give_usual_mode, read_json
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.weights import parameter_shapes

from .foreign import (
    ForeignCheckpoint,
    LazyTensor,
    Tensors,
    is_mask,
    resolved,
    unwrapped,
    without_tied_head,
)
from .pickles import open_pickle, state_dict

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKED_BIAS = "attn.masked_bias"
"""A constant that older versions of transformers saved as a tensor."""

ACTIVATIONS = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
}
"""transformers' names for our two activation functions. The first three are the same formula."""


HALF: dict[str, InferenceDType] = {"BF16": "bfloat16", "F16": "float16"}
"""Half precision as safetensors names it."""


def read_gpt2(folder: Path, name: str) -> ForeignCheckpoint:
    """Open a folder with config.json and safetensors (sharded or not) or pytorch_model.bin.

    Raises:
        UserError: If the architecture or an option is not supported, or the weights do not fit the
            configuration.
    """
    where = folder / "config.json"
    values = read_json(where)
    config = _config(values, where)
    tensors = _tensors(folder, config)
    ends, changes = ends_of_text(folder, values), []
    for i, factor in enumerate(_score_factors(values, config)):
        if factor != 1.0:
            changes = ["The scaling of the attention's scores is part of the queries' weights."]
            for part in ("weight", "bias"):
                key = f"transformer.h.{i}.attn.c_attn.{part}"
                tensors[key] = tensors[key].scaled_rows(0, config.n_embd, factor)
    return ForeignCheckpoint("Hugging Face GPT-2", name, config, tensors, folder, ends, changes)


def ends_of_text(folder: Path, values: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, by generation_config.json or else config.json, whose values
    follow."""
    path = folder / "generation_config.json"
    found = (read_json(path) if path.is_file() else {}).get("eos_token_id")
    found = values.get("eos_token_id") if found is None else found
    return [v for v in (found if isinstance(found, list) else [found]) if type(v) is int and v >= 0]


def _config(values: dict[str, Any], where: Path) -> ModelConfig:
    architectures = values.get("architectures") or ["GPT2LMHeadModel"]
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise UserError(f"{where}: architectures must be a list of names, not {architectures!r}")
    if values.get("model_type") != "gpt2" or not set(architectures) & {
        "GPT2LMHeadModel",
        "GPT2Model",
    }:
        raise UserError(
            f"{where}: architecture {architectures[0]} (model_type {values.get('model_type')!r}) "
            "is not supported; supported are the model types gpt2, llama, mistral, qwen2 and this "
            "project's own mla_gpt2"
        )
    for option in ("add_cross_attention", "quantization_config"):
        if values.get(option):
            raise UserError(f"{where}: {option} is not supported")
    c = GPT2Config().to_dict() | values
    named = c["activation_function"]
    activation = ACTIVATIONS.get(named) if isinstance(named, str) else None
    if activation is None:
        raise UserError(
            f"{where}: activation_function {named!r} is not supported; supported are "
            f"{', '.join(ACTIVATIONS)}"
        )
    names = (
        "n_layer",
        "n_head",
        "n_embd",
        "n_inner",
        "n_positions",
        "vocab_size",
        "layer_norm_epsilon",
        "tie_word_embeddings",
    )
    return resolved(
        where, attention="mha", activation_function=activation, **{n: c[n] for n in names}
    )


def _tensors(folder: Path, config: ModelConfig) -> Tensors:
    where, found = open_weights(folder)
    # GPT2Model saves its tensors without the prefix of GPT2LMHeadModel.
    found = {
        n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t
        for n, t in found.items()
    }
    found = {n: t for n, t in found.items() if not n.endswith(MASKED_BIAS) and not is_mask(n, t)}
    if config.tie_word_embeddings:
        found = without_tied_head(where, found)
    shapes = parameter_shapes(config)
    check_tensors(
        where, found, {n: s[::-1] if n.endswith(CONV1D) else s for n, s in shapes.items()}
    )
    return {n: t.T if n.endswith(CONV1D) else t for n, t in found.items()}


def _score_factors(values: Mapping[str, Any], config: ModelConfig) -> list[float]:
    """How each layer scales its scores beyond the usual 1 / sqrt(head_dim)."""
    unscaled = not values.get("scale_attn_weights", True)
    factor = math.sqrt(config.n_embd // config.n_head) if unscaled else 1.0
    by_layer = values.get("scale_attn_by_inverse_layer_idx", False)
    return [factor / (i + 1 if by_layer else 1) for i in range(config.n_layer)]


def open_weights(folder: Path) -> tuple[Path, Tensors]:
    """Open the weights of a folder. Also returns the file to name in messages."""
    for single, index, opener in (
        (WEIGHTS, INDEX, open_safetensors),
        (
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            lambda p: state_dict(open_pickle(p), p),
        ),
    ):
        if (folder / single).is_file():
            return folder / single, opener(folder / single)
        if (folder / index).is_file():
            tensors: Tensors = {}
            for shard in shards(folder / index):
                tensors |= opener(shard)
            return folder / index, tensors
    raise UserError(
        f"{folder}: has no weights (model.safetensors or pytorch_model.bin); the folder is "
        "incomplete"
    )


def open_safetensors(path: Path) -> Tensors:
    """Open a safetensors file. Tensors are read one by one; half precision becomes float32."""
    with _readable(path), safe_open(str(path), "np") as file:
        tensors = {
            n: LazyTensor(
                tuple(file.get_slice(n).get_shape()),
                _reader(path, n),
                HALF.get(file.get_slice(n).get_dtype(), "float32"),
            )
            for n in file.keys()  # noqa: SIM118  (safetensors' handle is not a dict)
        }
    return unwrapped(path, tensors)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not readable as safetensors ({e}); it may be truncated") from None
    except (TypeError, AttributeError, KeyError) as e:  # numbers for which NumPy has no type
        raise UserError(f"{path}: holds numbers of a type that is not supported ({e})") from None


def _reader(path: Path, name: str) -> Any:
    def read() -> np.ndarray:
        # The file is opened for each tensor, since a single mapping would keep the whole file in
        # memory besides the copies.
        with _readable(path), safe_open(str(path), "np") as file:
            kind = file.get_slice(name).get_dtype()
            if not kind.startswith(("F", "BF")):
                raise UserError(f"{path}: tensor {name} holds {kind}, not floating-point numbers")
            return file.get_tensor(name).astype(np.float32, copy=False)

    return read


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Ids of special tokens, as config.json and generation_config.json hold them."""
    ends = end_ids(tokenizer)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def write_folder(
    folder: Path,
    state: Mapping[str, np.ndarray],
    values: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    n_positions: int,
    dtype: InferenceDType,
) -> None:
    """Write a folder of transformers' layout, with no code of this project in it.

    Args:
        folder: Exists, and is empty.
        state: Tensors under their names.
        values: Of config.json. Ids from the tokenizer's size up to `vocab_size` are padding, which
            generation_config.json keeps from being sampled: no configuration has a field for it.
        dtype: Type to store the tensors in.
    """
    state = {n: np.ascontiguousarray(w, np.float32) for n, w in state.items()}
    save_file(in_type(state, dtype), str(folder / WEIGHTS), {"format": "pt"})
    give_usual_mode(folder / WEIGHTS)  # safetensors makes its files private
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    padding = list(range(len(tokenizer), values["vocab_size"]))
    ids = {name: values[name] for name in special_ids(tokenizer)}
    GenerationConfig(**ids, suppress_tokens=padding or None).save_pretrained(str(folder))
    tokenizer.model_max_length = n_positions
    tokenizer.save_pretrained(str(folder))


def write_gpt2(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    dtype: InferenceDType = "float32",
) -> None:
    """Write a plain `GPT2LMHeadModel` folder.

    Args:
        folder: An empty folder.
        config: The resolved configuration, with GPT-2's own attention.
        weights: float32 tensors in our layout.
        tokenizer: The model's tokenizer.
        dtype: Type to store the weights in.

    Raises:
        UserError: If GPT-2 cannot express the configuration.
    """
    if beyond := config.beyond_gpt2:
        raise UserError(
            f"--to hf needs GPT-2's own attention, but this model has {' '.join(beyond)}; "
            "transformers also loads it without --to hf"
        )
    biased = dataclasses.replace(
        config, attention_bias=True, attention_out_bias=True, mlp_bias=True
    )
    shapes = parameter_shapes(biased)  # a GPT-2 has every bias
    state = {n: weights.get(n, np.zeros(shape, np.float32)) for n, shape in shapes.items()}
    state = {n: w.T if n.endswith(CONV1D) else w for n, w in state.items()}
    if config.tie_word_embeddings:  # OpenAI's names, the only ones that mlx-lm's GPT-2 reads
        state = {n.removeprefix("transformer."): w for n, w in state.items()}
    fields = {f.name for f in dataclasses.fields(config)} & GPT2Config().to_dict().keys()
    ids = special_ids(tokenizer)
    hf = GPT2Config(
        **{n: getattr(config, n) for n in fields},
        **{**ids, "bos_token_id": tokenizer.eos_token_id},
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=0.0,
        architectures=["GPT2LMHeadModel"],
        dtype=dtype,
    )
    # n_ctx is an old name of n_positions, which mlx-lm asks for.
    values = {**json.loads(hf.to_json_string()), "n_ctx": config.n_positions}
    write_folder(folder, state, values, tokenizer, config.n_positions, dtype)
