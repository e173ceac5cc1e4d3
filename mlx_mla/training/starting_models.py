"""What a run starts from: random weights, those of --init, and the teacher of --teacher."""

import dataclasses
import shlex
from pathlib import Path

import numpy as np

from mlx_mla import checkpoint
from mlx_mla.backends.contract import Teacher
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.data.tokenizer import FolderTokenizer, Tokenizer, end_ids
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights

LONGEST = 1024
"""Tokens of a sequence where neither --seq-len nor a preset says; real models have far more
positions than a machine has memory for."""


def initial_weights_of(config: TrainConfig) -> dict[str, np.ndarray]:
    """The weights before the first step, float32 by name."""
    if config.init is None:
        return initial_weights(
            config.model, config.seed, config.initializer_range, config.initializer
        )
    return _weights("--init", _open(config.init), config.model)


def teacher(config: TrainConfig, tokenizer: Tokenizer) -> Teacher | None:
    """The model of --teacher; UserError if it cannot teach this one."""
    if config.teacher is None:
        return None
    folder = _open(config.teacher)
    shape = folder.config
    _check_tokenizer("--teacher", folder, tokenizer)
    if shape.n_positions < config.context:
        raise UserError(
            f"--teacher {folder}: has {shape.n_positions} positions, a sequence {config.context} "
            f"tokens; use --seq-len {shape.n_positions}, or another teacher"
        )
    assert shape.vocab_size
    if shape.vocab_size < tokenizer.size:
        raise UserError(
            f"--teacher {folder}: has {shape.vocab_size} rows of vocabulary for {tokenizer.size} "
            "ids; the folder is damaged"
        )
    return Teacher(shape, _weights("--teacher", folder, shape), tokenizer.size)


def with_shape_of_init(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with the model's shape from --init; its dropout stays."""
    assert config.init is not None
    folder = _open(config.init)
    _check_tokenizer("--init", folder, tokenizer)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(folder.config, dropout=config.model.dropout),
        seq_len=config.seq_len or min(folder.config.n_positions, LONGEST),
    )


def shape_of_init(config: TrainConfig) -> ModelConfig:
    """The shape of the model of --init."""
    assert config.init is not None
    return _open(config.init).config


def own_tokenizer(config: TrainConfig) -> str:
    """What --tokenizer is by default with --init or --teacher: the tokenizer of that model."""
    folder = checkpoint.model_folder(Path(config.init or config.teacher or ""))
    tokenizer = FolderTokenizer(str(folder))
    own, identity = tokenizer.fast_tokenizer(), tokenizer.identity
    # Both are the faster way to the same ids, but without --bpe-dir GPT-2's may be a download, and
    # they have neither a chat template nor a second end of text.
    here = identity == "bytes" or (identity == "gpt2" and config.bpe_dir is not None)
    plain = own.chat_template is None and len(end_ids(own)) == 1
    return identity if here and plain else str(folder.resolve())


def _open(name: str) -> ModelFolder:
    return ModelFolder(checkpoint.model_folder(Path(name)))


def _weights(option: str, folder: ModelFolder, shape: ModelConfig) -> dict[str, np.ndarray]:
    if problem := checkpoint.integrity_error(folder.path, training=False):
        raise UserError(f"{option} {folder}: {problem}; the folder is damaged")
    return folder.weights(shape)


def _check_tokenizer(option: str, folder: ModelFolder, tokenizer: Tokenizer) -> None:
    own = folder.tokenizer
    ids = len(own)
    if ids == tokenizer.size:
        if own.get_vocab() == tokenizer.fast_tokenizer().get_vocab():
            return
        advice = "leave --tokenizer out"
    elif tokenizer.fast_tokenizer().get_vocab().items() <= own.get_vocab().items():
        advice = (
            "make the rows of its added tokens padding with: python -m convert "
            f"{shlex.quote(str(folder))} --tokenizer {tokenizer.name} --out NEW"
        )
    else:
        advice = "leave --tokenizer out"
    raise UserError(
        f"{option} {folder}: its tokenizer has {ids} ids, --tokenizer {tokenizer.name} has "
        f"{tokenizer.size}; {advice}"
    )
