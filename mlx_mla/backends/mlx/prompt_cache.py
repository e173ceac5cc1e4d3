"""Prompt-cache files: a context that was read once, as mlx-lm keeps it on disk, and the model that
it belongs to."""

import copy
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from safetensors import SafetensorError, safe_open

from mlx_mla import checkpoint
from mlx_mla.backends.mlx.caches import adopt
from mlx_mla.errors import UserError
from mlx_mla.files import parse_json

SAMPLES, SAMPLE_BYTES = 64, 4096
_UNSEALED = "0" * 64
"""Stands in the header for the sha256 of the whole file with these zeros in it."""


def save(path: Path, cache: Sequence[Any], tokens: Sequence[int], folder: Path) -> None:
    """Write a cache and the tokens it holds; mlx-lm's tools can go on from the file, too.

    Args:
        path: File to write, complete or not at all; ends in .safetensors.
        cache: mlx-lm caches, a layer each, that hold `tokens` and nothing else.
        folder: The model's folder.

    Raises:
        UserError: If it cannot be written.
    """
    used = [copy.copy(c) for c in cache]
    for c in used:  # caches grow in steps; what is not used yet is not for the disk
        c.keys, c.values = tree_map(lambda a, end=c.offset: a[..., :end, :], (c.keys, c.values))
    about = {
        "model": str(folder),
        "tokenizer_config": "{}",  # for mlx_lm.generate --prompt-cache-file
        "fingerprint": fingerprint(folder),
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


def load(path: Path, folder: Path, dtype: mx.Dtype) -> tuple[list[Any], list[int]]:
    """Read what `save` wrote.

    Args:
        folder: Folder of the model that will go on from it.
        dtype: Type of that model's weights, to which the cache is brought.

    Returns:
        mlx-lm caches, a layer each, and the tokens they hold.

    Raises:
        UserError: If it is no such file, is truncated, or belongs to another model.
    """
    try:
        with safe_open(str(path), "np") as f:  # checks that the file is as long as it says
            about = f.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --save-prompt-cache writes one") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not readable as safetensors ({e}); it may be truncated") from None
    # mlx-lm 0.32 keeps what it was given under "0.", 0.31 under "1.".
    about = {
        key[2:]: value
        for key, value in about.items()
        if key[2:] in ("fingerprint", "model", "sha256", "shape", "tokens")
    }
    if "fingerprint" not in about or "tokens" not in about:
        raise UserError(
            f"{path}: does not say what model it is of; --save-prompt-cache writes files that do"
        )
    if about["fingerprint"] != fingerprint(folder):
        raise UserError(
            f"{path}: is of another model ({about.get('model')}: {about.get('shape')}) than "
            f"{folder} ({_shape(folder)}); read the prompt again with --save-prompt-cache"
        )
    if "sha256" in about and about["sha256"] != _sealed(path, about["sha256"]):
        raise UserError(
            f"{path}: damaged (its sha256 differs); read the prompt again with --save-prompt-cache"
        )
    tokens = parse_json(about["tokens"], f"{path}, tokens")
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise UserError(f"{path}: damaged, its tokens are no list of ids")
    try:
        return [_cast(adopt(c), dtype) for c in load_prompt_cache(str(path))], tokens
    except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a prompt cache of mlx-lm ({e})") from None


def check_fits(path: Path, cache: Sequence[Any], tokens: Sequence[int], one: Sequence[Any]) -> None:
    """UserError unless a loaded cache has as many tokens as it says, in the form of the model's.

    Args:
        path: Where it came from, for the message.
        one: The model's own caches after one token.
    """
    try:
        bits, group_size = (getattr(cache[0], name, None) for name in ("bits", "group_size"))
        if bits is not None:
            one = [c.to_quantized(group_size=group_size, bits=bits) for c in one]
        fits = [_form(c) for c in cache] == [_form(c) for c in one] and all(
            type(c.offset) is int and c.offset == len(tokens) > 0 for c in cache
        )
    except (AttributeError, IndexError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            f"{path}: damaged, it holds no cache of {len(tokens)} tokens of this model; read the "
            "prompt again with --save-prompt-cache"
        )


def _form(cache: Any) -> Any:
    """What caches of one model have in common, however many tokens they hold."""
    held = [a for _, a in tree_flatten([cache.keys, cache.values])]
    layout = [(a.dtype, a.shape[:2], a.shape[3:], a.shape[2] >= cache.offset) for a in held]
    return type(cache), layout


def _cast(cache: Any, dtype: mx.Dtype) -> Any:
    """An mlx-lm cache with its numbers in a type; codes of a quantised one stay as they are."""

    def cast(a: mx.array) -> mx.array:
        return a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a

    cache.keys, cache.values = tree_map(cast, (cache.keys, cache.values))
    return cache


def _seal(path: Path) -> None:
    """Put the checksum into a file that was written without."""
    with path.open("r+b") as f:
        header = f.read(8)
        header += f.read(int.from_bytes(header, "little"))
        f.seek(header.index(_UNSEALED.encode()))
        f.write(_sealed(path, _UNSEALED).encode())


def _sealed(path: Path, seal: str) -> str:
    """sha256 of a file whose header has zeros in place of `seal`."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        header = f.read(8)
        header += f.read(int.from_bytes(header, "little"))
        digest.update(header.replace(seal.encode(), _UNSEALED.encode(), 1))
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """sha256 of a model: its settings, the headers of its weight files and 64 samples spread over
    each.

    Reads a quarter of a megabyte of a file, however large it is. Other weights, another rank or
    another quantisation give another fingerprint.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as f:
            header = f.read(8)
            digest.update(header + f.read(int.from_bytes(header, "little")))
            for i in range(SAMPLES):
                f.seek(max(f.tell(), size * (i + 1) // SAMPLES - SAMPLE_BYTES))
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _shape(folder: Path) -> str:
    """What a cache of a model holds, in words."""
    config = checkpoint.read_config(folder)
    return f"{config.n_layer} layers, {config.kind.cache_text}"


def check_target(path: Path) -> None:
    """Refuse a name that mlx-lm would change, or a folder that is not there, before anything is
    computed."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: the name of a prompt cache must end in .safetensors")
    if not path.parent.is_dir():
        raise UserError(f"{path}: {path.parent} is not a folder")
