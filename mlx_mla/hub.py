"""Find a model: a run folder, a model folder or a repository on the Hugging Face hub."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from mlx_mla import checkpoint
from mlx_mla.errors import UserError, one_line
from mlx_mla.files import is_hub_id

FILES = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.model", "SHA256SUMS")
"""Patterns that match every file of a model folder that SHA256SUMS lists."""
TRAINING = ("*train_state.*",)
"""Twice the size of the model, and read on resuming alone."""


def find_model(name: str) -> checkpoint.ModelFolder:
    """Find and check the local model folder for a name, downloaded first if it is a hub id.

    Args:
        name: A run folder (its newest checkpoint is used), a model folder, or an `owner/name` on
            the hub, whose files stay in the hub's own cache.

    Raises:
        UserError: If there is no such model, it is damaged, or it cannot be downloaded.
    """
    path = Path(name)
    if path.exists():
        folder = checkpoint.model_folder(path)
    elif is_hub_id(name):
        folder = checkpoint.model_folder(download(name, None, FILES, TRAINING))
    else:
        raise UserError(
            f"{name}: no such folder, and not a hub id of the form owner/name; {_near(path)}"
        )
    if problem := checkpoint.integrity_error(folder, training=False):
        advice = "restore it from a copy"
        if older := checkpoint.before(path, folder):
            advice = f"the one before is {older}"
        elif not path.exists():
            advice = f"remove it with: hf cache rm model/{name}, and it is downloaded again"
        raise UserError(f"{folder}: damaged, {problem}; {advice}")
    return checkpoint.ModelFolder(folder)


def _near(path: Path) -> str:
    """A suggestion for a path that does not exist."""
    try:
        there = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return "check the path"
    close = difflib.get_close_matches(path.name, there, 1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def download(
    name: str, revision: str | None, patterns: Sequence[str], without: Sequence[str] = ()
) -> Path:
    """The folder of a repository on the hub, in the hub's own cache.

    Args:
        patterns: Of the files to download.
        without: Of those among them to leave out.

    Raises:
        UserError: If it cannot be downloaded.
    """
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(without),
            )
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name}: no such file or folder here, and the hub cannot be reached to download it; "
            "check the path or the network (and HF_HUB_OFFLINE)"
        ) from None
    except Exception as e:  # the hub, the network and the disk raise many types
        raise UserError(
            f"{name}: no such file or folder here, and its download failed ({one_line(e)}); for a "
            "gated or private model log in with: hf auth login; otherwise run the command again to "
            "resume"
        ) from None
