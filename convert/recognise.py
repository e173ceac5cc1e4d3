"""Recognize the format of a checkpoint, and open it."""

import zipfile
from pathlib import Path

import numpy as np

from mlx_mla import checkpoint
from mlx_mla.data.shards import LLMC_VERSIONS
from mlx_mla.errors import UserError
from mlx_mla.files import is_hub_id, read_json
from mlx_mla.hub import download, find_model
from mlx_mla.model.weights import parameter_shapes

from . import hf, karpathy, llama, llmc
from .foreign import ForeignCheckpoint

KNOWN = (
    "a Hugging Face folder or hub id of a GPT-2, Llama, Mistral or Qwen2, a .pt of "
    "MLA-Transformer, nanoGPT, build-nanogpt or minGPT, a model .bin of llm.c, or a model folder "
    "of this project"
)
SMALL_FILES = ["*.json", "*.txt", "*.jinja"]


def open_source(
    name: str, revision: str | None = None, n_head: int | None = None
) -> ForeignCheckpoint:
    """Open a checkpoint of any known format. No code in it runs.

    Args:
        name: A path, or an `owner/name` on the hub, which is downloaded to the hub's own cache.
        revision: Branch, tag or commit of a hub id.
        n_head: Number of heads, if the file does not record it.

    Raises:
        UserError: If the checkpoint does not exist, is damaged, or has an unknown format.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UserError(
                f"--revision requires a hub id, but {name} is a path; leave out --revision"
            )
        source = (
            _open_folder(path, path.resolve().name) if path.is_dir() else _open_file(path, n_head)
        )
    elif is_hub_id(name) and path.suffix != ".pt":
        source = _open_folder(_download(name, revision), name)
    else:
        raise UserError(f"{name}: no such file or folder, and not a hub id of the form owner/name")
    if n_head is not None and source.kind not in ("MLA-Transformer", "minGPT"):
        raise UserError(f"{name}: records its number of heads; leave out --n-head")
    return source


def _open_folder(path: Path, name: str) -> ForeignCheckpoint:
    if (path / "checkpoints").is_dir():
        return _own(find_model(str(path)), name)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: has no config.json; supported are {KNOWN}")
    kind = read_json(path / "config.json").get("model_type")
    if kind == "mla_gpt2":
        return _own(find_model(str(path)), name)
    return llama.read_llama(path, name) if llama.is_llama(kind) else hf.read_gpt2(path, name)


def _own(folder: checkpoint.ModelFolder, name: str) -> ForeignCheckpoint:
    if folder.is_quantized:
        raise UserError(f"{folder}: quantized by mlx-lm; convert the original model instead")
    where, tensors = hf.open_weights(folder.path)
    checkpoint.check_tensors(where, tensors, parameter_shapes(folder.config))
    return ForeignCheckpoint("mlx_mla", name, folder.config, tensors, folder.path)


def _open_file(path: Path, n_head: int | None) -> ForeignCheckpoint:
    try:
        with path.open("rb") as f:
            start = f.read(4)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    magic = int(np.frombuffer(start, "<i4")[0]) if len(start) == 4 else 0
    if magic == llmc.MAGIC:
        return llmc.read_llmc(path)
    if magic in {known for known, _ in LLMC_VERSIONS}:
        raise UserError(
            f"{path}: holds token ids of llm.c, not a model; a model .bin begins with {llmc.MAGIC}"
        )
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: a single file; give its folder, which holds the config.json")
    if zipfile.is_zipfile(path) or start[:1] == b"\x80" or path.suffix in (".pt", ".pth"):
        return karpathy.read_checkpoint(path, n_head)
    raise UserError(f"{path}: not a known checkpoint format; supported are {KNOWN}")


def _download(name: str, revision: str | None) -> Path:
    """Download a repository: its small files, and its weights in the safest available format."""
    for weights in ("model*.safetensors", "pytorch_model*.bin"):
        folder = download(name, revision, [*SMALL_FILES, weights], ["*/*"])
        if any(folder.glob(weights)):
            break
    return folder
