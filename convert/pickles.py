"""Read pickled files without running code from them: PyTorch's, and pickles of plain values."""

import collections
import contextlib
import importlib.util
import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from mlx_mla.errors import UserError
from mlx_mla.model.config import InferenceDType

from .foreign import LazyTensor, Tensors, unwrapped


class PickledConfig:
    """Replaces build-nanogpt's `GPTConfig`, which its checkpoints hold as a pickled object.

    Unpickling sets the attributes of the object and calls nothing.
    """


ALLOWED = [(PickledConfig, "__main__.GPTConfig"), (PickledConfig, "train_gpt2.GPTConfig")]
"""The classes that a file may name in addition to those of `weights_only`: build-nanogpt's, under
the names that it has as a script and as an import."""

PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET",
    "LONG_BINGET", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND",
    "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
"""Pickle operations that create plain values. None of them names or calls code."""

_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
"""Operations that put values into the container below them on the stack."""

_DEEPEST = 100
"""Maximum levels of nested containers. Hashing a tuple of 300,000 levels crashes the process."""

_LARGEST_PLAIN = 16 << 20
"""Maximum bytes of a pickle of plain values: more than all characters of Unicode need."""

_LEGACY_PICKLES = 5
"""Number of pickles at the start of a file in torch.save's old format, before it wrote archives."""


def open_pickle(path: Path) -> Any:
    """Open an object that `torch.save` wrote.

    Tensors stay on disk until they are read, if the format allows it.

    Raises:
        UserError: If the file is damaged, or holds anything but tensors, plain values and objects
            of `ALLOWED`.
    """
    require_torch(f"{path}: reading a pickled checkpoint")
    import torch

    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and _is_compressed(path):
            raise UserError(
                f"{path}: refused, since it is a compressed archive, which torch.save does not "
                "write"
            )
        with _pickles_in(path, is_zip) as streams:
            for stream in streams:
                collections.deque(_operations(stream, path), maxlen=0)
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            # torch.load warns of other protocols than torch.save's before it raises.
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


def plain_values(path: Path) -> Any:
    """Read a pickle of plain values: strings, numbers, tuples, lists and dicts.

    Raises:
        UserError: If the file is damaged, too large, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_PLAIN + 1)
        if len(data) > _LARGEST_PLAIN:
            raise UserError(f"{path}: refused, since it is larger than {_LARGEST_PLAIN:,} bytes")
        for name, argument in _operations(io.BytesIO(data), path):
            if name not in PLAIN:
                raise UserError(f"{path}: refused, since it holds more than plain values ({name})")
            if name.endswith("PUT") and int(argument or 0) > len(data):
                raise UserError(f"{path}: not readable as a pickle; it is damaged")
        return pickle.loads(data)
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except UserError:
        raise
    except Exception as e:  # a damaged pickle fails in as many ways as it has bytes
        kind = type(e).__name__
        raise UserError(f"{path}: not readable as a pickle ({kind}); it is damaged") from None


@contextlib.contextmanager
def _pickles_in(path: Path, is_zip: bool) -> Iterator[Iterator[IO[bytes]]]:
    """Open one stream per pickle of a PyTorch file, positioned at its start."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if e.filename.endswith(".pkl")]
            yield (io.BytesIO(archive.read(entry)) for entry in entries)
    else:
        with path.open("rb") as file:
            yield (file for _ in range(_LEGACY_PICKLES) if file.peek(1))


class _Level:
    """The depth of nested containers in a value, which grows as values are added to it."""

    def __init__(self, number: int):
        self.number = number


def _operations(stream: IO[bytes], where: Path) -> Iterator[tuple[str, Any]]:
    """Yield the names and arguments of a pickle's operations, up to its end.

    Raises:
        UserError: If the values are nested too deeply. The depth is counted without creating them.
    """
    stack: list[_Level | None] = []  # None is a mark
    memo: dict[int, _Level] = {}
    for operation, argument, _ in pickletools.genops(stream):
        name, before, number = operation.name, operation.stack_before, cast(int, argument)
        yield name, argument
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[number])
            continue
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else number] = stack[-1] or _Level(0)
            continue
        taken: list[_Level | None] = []
        count = len(before)
        if pickletools.markobject in before:
            count = before.index(pickletools.markobject)
            while (value := stack.pop()) is not None:
                taken.append(value)
        taken += [stack.pop() for _ in range(count)]
        numbers = [value.number if value else 0 for value in taken]
        result = _Level(1 + max(numbers) if numbers else 0)
        if name in _GROWING and (container := taken[-1]):
            container.number = max(numbers[-1], 1 + max(numbers[:-1], default=0))
            result = container
        if result.number > _DEEPEST:
            raise UserError(
                f"{where}: refused, since its values are nested more than {_DEEPEST} levels deep"
            )
        stack += [None if o is pickletools.markobject else result for o in operation.stack_after]


def _is_compressed(path: Path) -> bool:
    """True if a zip archive has compressed entries."""
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def state_dict(values: Any, where: Path) -> Tensors:
    """Return the tensors of a state dict, without the prefixes of wrapping modules.

    Raises:
        UserError: If it is not a mapping from names to tensors.
    """
    if not isinstance(values, dict) or not values:
        raise UserError(f"{where}: holds no state dict (a mapping from names to tensors)")
    import torch

    halves: dict[torch.dtype, InferenceDType]
    halves = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
    tensors: Tensors = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{where}: {name!r} is not a tensor; this is not a state dict of a known project"
            )
        _check_storage(name, value, where)
        stored = halves.get(value.dtype, "float32")
        tensors[name] = LazyTensor(tuple(value.shape), _reader(value, name, where), stored)
    size = sum({s.data_ptr(): s.nbytes() for s in map(_storage, values.values())}.values())
    if sum(v.numel() * v.element_size() for v in values.values()) > 2 * size:
        raise UserError(
            f"{where}: its tensors share more values than a tied head does; save it with "
            "torch.save of separate tensors"
        )
    return unwrapped(where, tensors)


def _storage(value: Any) -> Any:
    return value.untyped_storage()


def _check_storage(name: str, value: Any, where: Path) -> None:
    """Refuse a tensor whose values are not all in the file: expanded, sparse or on a device."""
    import torch

    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(
            f"{where}: tensor {name} is not a plain array with all its values in the file; save it "
            "with torch.save of contiguous CPU tensors"
        )


def _reader(value: Any, name: str, where: Path) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            if value.dtype.is_floating_point:
                values: np.ndarray = value.detach().float().numpy()
                return values
        except (RuntimeError, NotImplementedError):
            pass  # a type that PyTorch can store but not convert
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"{where}: tensor {name} holds {kind}, not floating-point numbers")

    return read


def require_torch(what: str) -> None:
    """Raise a UserError if PyTorch is not installed. Call it before importing PyTorch.

    Args:
        what: What needs PyTorch, as the beginning of the message.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{what} needs PyTorch; install it with: pip install torch")
