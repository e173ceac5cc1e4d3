"""Model folders and training state on disk: complete or absent, checked by sha256.

A model folder holds config.json, model.safetensors, model_mlx.py, model_torch.py,
configuration_mla_gpt2.py, the tokenizer's files and a README.md; a training checkpoint adds
train_state.safetensors and train_state.json. Other tools may split the weights of a folder they
write into shards, model-00001-of-00002.safetensors and so on, which model.safetensors.index.json
lists. `SHA256SUMS` (as `sha256sum -c` reads it) covers every
file but the README.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy bfloat16, which safetensors then reads and writes)
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from mlx_mla.data.tokenizer import end_ids, read_tokenizer
from mlx_mla.errors import UserError, shown
from mlx_mla.fields import Count, value_of
from mlx_mla.files import (
    SUMS,
    clear_leftovers,
    give_usual_mode,
    read_json,
    read_sums,
    read_text,
    sha256,
)
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.configuration_mla_gpt2 import AUTO_MAP, CODE, MLX_FILE
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import moment_shapes, not_finite, parameter_shapes

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MODEL_FILES = Path(__file__).with_name("model")
STATE = "train_state.safetensors"
STATE_INFO = "train_state.json"
STATE_FORMAT = 1
_OURS = ("config.json", "model*.safetensors", "model_*.py", "configuration_*.py", "tokenizer*.json",
         "train_state.*")  # fmt: skip
"""Files of a model folder without which, in its SHA256SUMS, that list is not whole."""


def write_model(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    card: str,
    dtype: InferenceDType = "float32",
) -> None:
    """Write the files of a model folder into an existing folder.

    Args:
        folder: Usually what `atomic_folder` gives.
        config: Resolved configuration.
        weights: The tensors that `parameter_shapes(config)` names.
        card: Text of the model card, README.md.
        dtype: Type to store them in.
    """
    _save_tensors(folder / WEIGHTS, in_type(weights, dtype))
    values = {**model_config_json(config, tokenizer), "dtype": dtype}
    _write_json(folder / "config.json", values)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for name in CODE:
        shutil.copyfile(MODEL_FILES / name, folder / name)
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(str(folder))


def model_config_json(config: ModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """config.json: our fields, and the few by which other tools find their way."""
    assert config.vocab_size
    ends = end_ids(tokenizer)
    eos = ends[0] if ends else None
    bos = tokenizer.bos_token_id
    values = {
        "model_type": "mla_gpt2",
        "architectures": ["MLAGPT2LMHeadModel"],
        "model_file": MLX_FILE,
        "auto_map": AUTO_MAP,
        **config.to_dict(),
        # The names under which transformers and mlx-lm look for the same facts.
        "num_hidden_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.n_positions,
        "bos_token_id": eos if bos is None else bos,
        "eos_token_id": ends if len(ends) > 1 else eos,
    }
    if len(tokenizer) < config.vocab_size:
        # The model files give the rows beyond no probability, so no tool samples them.
        values["tokenizer_size"] = len(tokenizer)
    return values


def in_type(weights: Mapping[str, np.ndarray], dtype: InferenceDType) -> dict[str, np.ndarray]:
    """float32 weights rounded to a type; UserError where one is too large for it."""
    if dtype == "float32":
        return dict(weights)
    with np.errstate(over="ignore"):
        rounded = {name: w.astype(dtype) for name, w in weights.items()}
    if large := not_finite({name: w.astype(np.float32) for name, w in rounded.items()}):
        raise UserError(f"--dtype {dtype}: tensor {large} has values too large; use bfloat16")
    return rounded


def write_train_state(
    folder: Path, tensors: Mapping[str, np.ndarray], info: Mapping[str, Any]
) -> None:
    """Add optimizer tensors (`moment_shapes` names them) and `train_state.json` to a folder."""
    _save_tensors(folder / STATE, tensors)
    _write_json(folder / STATE_INFO, info)


class ModelFolder:
    """A model folder of ours on disk. Its config.json is read at once, the rest when it is needed.

    The model files in it are never executed: the package's own are the same model.

    Args:
        path: The folder itself; `model_folder` finds the one that a run folder means.

    Raises:
        UserError: If config.json is missing, damaged, or of another kind of model.
    """

    def __init__(self, path: Path):
        self.path = path
        where = path / "config.json"
        values = read_json(where)
        if values.get("model_type") != "mla_gpt2":
            raise UserError(
                f"{path}: config.json says model_type {shown(values.get('model_type'))}, and this "
                "needs 'mla_gpt2'; convert it with: python -m convert MODEL --out NEW"
            )
        self.config = ModelConfig.read(values, str(where))
        """The resolved configuration."""
        self.is_quantized = "quantization" in values
        """True if mlx-lm has quantized the weights, which then only MLX reads."""

    def __str__(self) -> str:
        return str(self.path)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Its tokenizer; UserError if there is none, or none that can be used."""
        return read_tokenizer(self.path)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration and, of each weight file, the header and 64 samples spread
        over it.

        It reads a quarter of a megabyte per file. Other weights, another rank or another
        quantization give another fingerprint.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in sorted(self.path.glob("model*.safetensors")):
            size = path.stat().st_size
            with path.open("rb") as f:
                header = f.read(8)
                digest.update(header + f.read(int.from_bytes(header, "little")))
                for i in range(64):
                    f.seek(max(f.tell(), size * (i + 1) // 64 - 4096))
                    digest.update(f.read(4096))
        return digest.hexdigest()

    def weight_files(self) -> list[Path]:
        """The files that hold the weights: model.safetensors, or the shards in its index; UserError
        if one is missing."""
        index = self.path / INDEX
        if index.is_file() and not (self.path / WEIGHTS).is_file():
            return shards(index)
        return [self.path / WEIGHTS]

    def weights(self, expected: ModelConfig | None = None) -> dict[str, np.ndarray]:
        """All tensors by name, float32.

        Args:
            expected: The configuration that names and shapes must fit. None: the folder's own.

        Raises:
            UserError: If they do not fit, are quantized, or are not finite.
        """
        if self.is_quantized:
            raise UserError(f"{self}: quantized by mlx-lm, which only MLX reads; use --backend mlx")
        tensors: dict[str, np.ndarray] = {}
        for path in self.weight_files():
            tensors |= _load_tensors(path)
        shapes, where = parameter_shapes(expected or self.config), self.path / WEIGHTS
        check_tensors(where, tensors, shapes)
        weights = {name: tensors[name].astype(np.float32, copy=False) for name in shapes}
        if bad := not_finite(weights):
            raise UserError(
                f"{where}: tensor {bad} has values that are not finite; the model is unusable"
            )
        return weights


def check_tensors(
    where: object, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare tensors, which have a `shape`, with those that a configuration requires.

    Raises:
        UserError: If tensors are missing, unexpected or of another shape; the message names them.
    """
    if missing := [n for n in expected if n not in found]:
        raise UserError(f"{where}: missing {_some(missing)}; the checkpoint is incomplete")
    if unexpected := [n for n in found if n not in expected]:
        raise UserError(
            f"{where}: unexpected {_some(unexpected)}; this is not the architecture that it claims "
            "to be"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {found[name].shape}, but the configuration "
                f"requires {shape}"
            )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def shards(index: Path) -> list[Path]:
    """The files that an index of weights lists; UserError if it lists none or one is missing."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
        raise UserError(f"{index}: has no weight_map; the index is damaged")
    files = [index.parent / name for name in sorted(set(placed.values()))]
    for path in files:
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{path}: no such file, and {index.name} names it; download it again")
    return files


_NEW_RUN = "start a new run with --init"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What `train_state.json` holds of a training checkpoint."""

    step: Count
    val_loss: float | None
    """None: not measured yet."""
    data_sha256: str | None = None
    data_samples_sha256: str | None = None
    """None: written by a version that kept no samples of the data."""


def read_train_info(folder: Path) -> TrainState:
    """`train_state.json` of a training checkpoint; UserError if it is missing or damaged, or of
    another step than the folder."""
    path = folder / STATE_INFO
    values = read_json(path)
    if values.get("format") != STATE_FORMAT:
        raise UserError(
            f"{path}: format {shown(values.get('format'))}, and this version reads {STATE_FORMAT}; "
            f"resume with the version of mlx_mla that wrote it, or {_NEW_RUN}"
        )
    info: TrainState = value_of(TrainState, values, str(path), _NEW_RUN)
    if _is_checkpoint(folder) and info.step != step_of(folder):
        raise UserError(f"{path}: step {info.step} is not that of {folder.name}; {_NEW_RUN}")
    return info


def read_train_state(folder: Path, config: TrainConfig) -> tuple[dict[str, np.ndarray], TrainState]:
    """Optimizer tensors and `train_state.json` of a training checkpoint.

    Raises:
        UserError: Also if the tensors are missing or damaged, or do not fit the model.
    """
    if not (folder / STATE).is_file():
        raise UserError(
            f"{folder}: has no {STATE}, so training cannot resume from it; use --init "
            f"{shlex.quote(str(folder))}"
        )
    info = read_train_info(folder)
    tensors = _load_tensors(folder / STATE)
    if bad := not_finite(tensors):
        raise UserError(f"{folder / STATE}: tensor {bad} has values that are not finite")
    for key, shape in moment_shapes(config).items():
        if key not in tensors or tensors[key].shape != shape:
            found = f"has shape {tensors[key].shape}" if key in tensors else "is missing"
            raise UserError(
                f"{folder / STATE}: the optimizer state does not fit the model: tensor {key} "
                f"{found}, and the model needs {shape}; {_NEW_RUN}"
            )
    return tensors, info


def integrity_error(folder: Path, training: bool = True) -> str | None:
    """What is wrong with a folder by its SHA256SUMS, in a few words; None if it is whole.

    A folder without SHA256SUMS (another tool wrote it) is not checked.

    Args:
        training: Also check the training state, twice the size of the model, which only resuming
            reads.
    """
    if not os.path.lexists(folder / SUMS):
        return None
    try:
        listed = read_sums(folder)
    except UserError as e:
        return str(e)
    for pattern in _OURS:
        for path in folder.glob(pattern):
            if path.name not in listed:
                return f"{SUMS} is truncated ({path.name} is not in it)"
    for name, expected in listed.items():
        path = folder / name
        if name in (STATE, STATE_INFO) and not training:
            continue
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != expected:
            return f"{name} is truncated or changed (its sha256 differs)"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; other folders there, such as copies of them,
    are none."""
    folders = (p for p in (run / "checkpoints").glob("step-*") if _is_checkpoint(p))
    return sorted(folders, key=step_of)


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step-[0-9]{6,18}", path.name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def before(run: Path, checkpoint: Path) -> Path | None:
    """The newest checkpoint of a run that is older than one of its checkpoints, or None."""
    older = [c for c in checkpoints(run) if step_of(c) < step_of(checkpoint)]
    return older[-1] if older else None


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None if it has none."""
    with contextlib.suppress(UserError):
        name = read_text(run / "latest", 100).strip()
        named = run / "checkpoints" / name
        if named.name == name and _is_checkpoint(named):
            return named
    # The run died between the rename and the update of `latest`; a checkpoint is whole if it is
    # there.
    return checkpoints(run)[-1] if checkpoints(run) else None


def prune(run: Path, keep: int, newest: int) -> None:
    """Remove all but the newest `keep` checkpoints (0: none), and what killed runs left
    half-written.

    Args:
        newest: Step just saved. Checkpoints after it, of a run that was resumed from an earlier
            step, do not count and stay until they are written anew.
    """
    clear_leftovers(run / "checkpoints", "step-*")
    if keep:
        for old in [c for c in checkpoints(run) if step_of(c) <= newest][:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def model_folder(path: Path) -> Path:
    """The model folder that a path means: the path itself, or the newest checkpoint of a run
    folder.

    Raises:
        UserError: If there is no model.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such model folder")
    if (path / "checkpoints").is_dir():
        newest = latest(path)
        if newest is None:
            raise UserError(f"{path}: this run has saved no checkpoint yet")
        return newest
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: not a model folder (no config.json) and not a run folder (no checkpoints/)"
        )
    if not any(path.glob("model*.safetensors")):
        raise UserError(f"{path}: has no weights (model.safetensors); the folder is incomplete")
    return path


def _save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    # The metadata is what transformers and mlx-lm write; loaders of both look for it.
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, str(path), {"format": "mlx"}
    )
    give_usual_mode(path)  # safetensors makes its files private


def _load_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the folder has no weights") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as e:
        raise UserError(f"{path}: not readable as safetensors ({e}); it may be truncated") from None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
