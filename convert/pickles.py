"""PyTorch's pickled files, opened without running what is in them."""

import importlib.util
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla.errors import UserError

from .foreign import LazyTensor, Tensors, unwrapped


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
        is_zip = zipfile.is_zipfile(path)
        if is_zip and _is_compressed(path):
            raise UserError(
                f"{path}: a compressed archive, which torch.save does not write; it is refused"
            )
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            # It remarks on protocols other than torch.save's, and then says why it stops.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
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


def _is_compressed(path: Path) -> bool:
    """Whether a zip archive unpacks to more than it is."""
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


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
        _check_storage(name, value, where)
        tensors[name] = LazyTensor(tuple(value.shape), _reader(value, name, where))
    stored = sum({s.data_ptr(): s.nbytes() for s in map(_storage, values.values())}.values())
    if sum(v.numel() * v.element_size() for v in values.values()) > 2 * stored:
        raise UserError(f"{where}: its tensors share their values, more than a tied head does")
    return unwrapped(where, tensors)


def _storage(value: Any) -> Any:
    return value.untyped_storage()


def _check_storage(name: str, value: Any, where: Path) -> None:
    """Refuse a tensor that is not numbers in the file: repeated, sparse, or on another device."""
    import torch

    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(
            f"{where}: tensor {name} is no plain array with all its values in the file; save it "
            "with torch.save of contiguous CPU tensors"
        )


def as_float32(value: Any, name: str, where: Path) -> np.ndarray:
    """Values of a PyTorch tensor; UserError if they are no floating-point numbers."""
    try:
        if value.dtype.is_floating_point:
            values: np.ndarray = value.detach().float().numpy()
            return values
    except (RuntimeError, NotImplementedError):
        pass  # a type that PyTorch can store and not convert
    kind = str(value.dtype).removeprefix("torch.")
    raise UserError(f"{where}: tensor {name} holds {kind}, not floating-point numbers")


def _reader(value: Any, name: str, where: Path) -> Callable[[], np.ndarray]:
    return lambda: as_float32(value, name, where)


def require_torch(what: str) -> None:
    """Raise UserError if PyTorch is not installed; to be called before it is imported.

    Args:
        what: What needs it, to begin the message with.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{what} needs PyTorch; install it with: pip install torch")
