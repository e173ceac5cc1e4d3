"""Find a model: a run folder, a model folder, or a repository on the Hugging Face hub."""

import difflib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.files import is_hub_id

FILES = ["*.json", "*.safetensors", "*.py", "SHA256SUMS"]
"""What a model folder needs to be whole by its SHA256SUMS."""


def find_model(name: str, revision: str | None = None) -> checkpoint.ModelFolder:
    """The local model folder that a name means, checked; downloads it if it is a hub id.

    Args:
        name: A run folder (its newest checkpoint is taken), a model folder, or `owner/name` on the
            hub, whose files are kept in the hub's own cache.
        revision: Branch, tag or commit, for a hub id.

    Raises:
        UserError: If it is neither, is damaged, or cannot be downloaded.
    """
    path = Path(name)
    if path.exists():
        folder = checkpoint.model_folder(path)
    elif is_hub_id(name):
        folder = checkpoint.model_folder(_download(name, revision))
    else:
        raise UserError(
            f"{name}: no such folder, and not a hub id of the form owner/name; {_near(path)}"
        )
    if problem := checkpoint.integrity_error(folder, training=False):
        older = (
            checkpoint.checkpoints(path)
            if folder.parent.name == "checkpoints" and path != folder
            else []
        )
        others = [p for p in older if p != folder]
        advice = f"the one before is {others[-1]}" if others else "restore it from a copy"
        raise UserError(f"{folder}: damaged, {problem}; {advice}")
    return checkpoint.ModelFolder(folder)


def _near(path: Path) -> str:
    """What the user may have meant by a path that is not there."""
    try:
        there = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return "check the path"
    close = difflib.get_close_matches(path.name, there, 1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name}: no such folder here, and the hub cannot be reached to download it; check the "
            "path or the network (and HF_HUB_OFFLINE)"
        ) from None
    except (HfHubHTTPError, HFValidationError) as e:
        raise UserError(
            f"{name}: no such folder here, and the hub says: {str(e).strip().splitlines()[0]}"
        ) from None
