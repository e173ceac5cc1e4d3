"""Prompt-cache files: a context that was read once, in mlx-lm's format, and the model that it
belongs to."""

import copy
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from safetensors import SafetensorError, safe_open

from mlx_mla.backends.mlx.caches import adopt
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.errors import UserError
from mlx_mla.fields import Count, value_of
from mlx_mla.files import parse_json

_UNSEALED = "0" * 64
"""Placeholder in the header; it is replaced by the sha256 of the file with the placeholder."""
_AGAIN = "read the prompt again with --save-prompt-cache"


def save(path: Path, cache: Sequence[Any], tokens: Sequence[int], folder: ModelFolder) -> None:
    """Write a cache and the tokens it holds; mlx-lm's tools can use the file, too.

    Args:
        path: File to write, complete or not at all; ends in .safetensors.
        cache: mlx-lm caches, one per layer, that hold `tokens` and nothing else.

    Raises:
        UserError: If it cannot be written.
    """
    used = [copy.copy(c) for c in cache]
    for c in used:  # caches grow in steps; the unused rest is not written
        c.keys, c.values = tree_map(lambda a, end=c.offset: a[..., :end, :], (c.keys, c.values))
    about = {
        "model": str(folder),
        "tokenizer_config": "{}",  # for mlx_lm.generate --prompt-cache-file
        "fingerprint": folder.fingerprint,
        "shape": _shape(folder),
        "tokens": json.dumps(list(tokens)),
        "sha256": _UNSEALED,
    }
    unfinished = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(8)}.safetensors")
    try:
        save_prompt_cache(str(unfinished), used, about)
        _seal(unfinished)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{path}: cannot be written: {e}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path, folder: ModelFolder, dtype: mx.Dtype) -> tuple[list[Any], list[int]]:
    """Read what `save` wrote.

    Args:
        folder: Folder of the model that will continue from it.
        dtype: Type of that model's weights, to which the cache is cast.

    Returns:
        mlx-lm caches, one per layer, and the tokens they hold.

    Raises:
        UserError: If it is not such a file, is damaged, or belongs to another model.
    """
    try:
        with safe_open(str(path), "np") as f:  # checks that the file is as long as it says
            about = f.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --save-prompt-cache writes one") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not readable as safetensors ({e}); it may be truncated") from None
    # mlx-lm keeps what it was given under "0.".
    about = {
        key[2:]: value
        for key, value in about.items()
        if key[2:] in ("fingerprint", "model", "sha256", "shape", "tokens")
    }
    if missing := {"fingerprint", "tokens", "sha256"} - about.keys():
        raise UserError(f"{path}: has no {min(missing)}, with which it can be checked; {_AGAIN}")
    if about["fingerprint"] != folder.fingerprint:
        raise UserError(
            f"{path}: is of another model ({about.get('model')}: {about.get('shape')}) than "
            f"{folder} ({_shape(folder)}); {_AGAIN}"
        )
    if about["sha256"] != _sealed(path, about["sha256"]):
        raise UserError(f"{path}: damaged (its sha256 differs); {_AGAIN}")
    where = f"{path}, tokens"
    tokens = value_of(list[Count], parse_json(about["tokens"], where), where, _AGAIN)
    try:
        return [_cast(adopt(c), dtype) for c in load_prompt_cache(str(path))], tokens
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a prompt cache of mlx-lm ({e})") from None


def _cast(cache: Any, dtype: mx.Dtype) -> Any:
    """Cast an mlx-lm cache to a type; the codes of a quantized cache stay as they are."""

    def cast(a: mx.array) -> mx.array:
        return a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a

    cache.keys, cache.values = tree_map(cast, (cache.keys, cache.values))
    return cache


def _seal(path: Path) -> None:
    """Replace the placeholder in a file by its checksum."""
    with path.open("r+b") as f:
        header = f.read(8)
        header += f.read(int.from_bytes(header, "little"))
        f.seek(header.index(_UNSEALED.encode()))
        f.write(_sealed(path, _UNSEALED).encode())


def _sealed(path: Path, seal: str) -> str:
    """sha256 of a file with the placeholder in place of `seal`."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        header = f.read(8)
        header += f.read(int.from_bytes(header, "little"))
        digest.update(header.replace(seal.encode(), _UNSEALED.encode(), 1))
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _shape(folder: ModelFolder) -> str:
    """The layers and widths of a model's cache, in words."""
    config = folder.config
    return f"{config.n_layer} layers, {config.attention_spec.cache_text}"


def check_target(path: Path) -> None:
    """UserError for a name that mlx-lm would change or a missing folder, before any computation."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the name of a prompt cache must end in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"{path}: {path.parent} is not a folder")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot be written; give --save-prompt-cache another name")
