"""PyTorch's pickled files, opened without running what is in them."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla.errors import UserError

from .foreign import LazyTensor, Tensors
from .framework import require_torch

WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes by torch.compile and DistributedDataParallel."""


class PickledConfig:
    """Stands for build-nanogpt's `GPTConfig`, which its checkpoints hold as a pickled object.

    Unpickling sets the attributes of the object and calls nothing.
    """


ALLOWED = [(PickledConfig, "__main__.GPTConfig"), (PickledConfig, "train_gpt2.GPTConfig")]
"""The classes beyond `weights_only` that a file may name: build-nanogpt's, run as a script or
imported."""


def open_pickle(path: Path) -> Any:
    """What `torch.save` wrote into a file; tensors stay on disk until they are read, where the
    format allows.

    Raises:
        UserError: If the file is damaged, or names code beyond tensors, plain values and `ALLOWED`.
    """
    require_torch(f"{path}: reading a pickled checkpoint")
    import torch

    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # it remarks on protocols other than torch.save's, and then says why it stops
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as e:
        reason = str(e)
        if "GLOBAL" in reason or "global" in reason or "REDUCE" in reason or "reduce" in reason:
            named = reason.split("GLOBAL ")[-1].split(" was not")[0].splitlines()[0].strip()
            raise UserError(
                f"{path}: refused, since it would run code when opened ({named})"
            ) from None
        raise UserError(
            f"{path}: not readable as a PyTorch checkpoint; it is damaged or truncated"
        ) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except Exception as e:  # a damaged pickle fails in as many ways as it has bytes
        kind = type(e).__name__
        raise UserError(
            f"{path}: not readable as a PyTorch checkpoint ({kind}); it is damaged or truncated"
        ) from None


def state_dict(values: Any, where: Path) -> Tensors:
    """The tensors of a state dict, without the prefixes of wrapping modules.

    Raises:
        UserError: If it is not a mapping from names to tensors.
    """
    if not isinstance(values, dict) or not values:
        raise UserError(f"{where}: holds no state dict (a mapping from names to tensors)")
    import torch

    tensors: Tensors = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{where}: {name!r} is no tensor; this is no state dict that is known here"
            )
        tensors[_unwrapped(name)] = LazyTensor(tuple(value.shape), _reader(value))
    return tensors


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        for prefix in WRAPPERS:
            name = name.removeprefix(prefix)
    return name


def _reader(value: Any) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        return value.detach().float().numpy()

    return read
