"""A checkpoint that is being read: its configuration, and tensors that are loaded when they are
asked for."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlx_mla.errors import UserError
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.weights import parameter_shapes


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape is known and whose values are read on demand."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Gives the values; float32 after `ForeignCheckpoint.weights` has checked them."""
    stored: InferenceDType = "float32"
    """Narrowest of our types that holds the values as the file has them."""

    @property
    def T(self) -> "LazyTensor":
        """The transposed matrix."""
        return LazyTensor(self.shape[::-1], lambda: self.read().T, self.stored)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        """The same values in other places of the same shape."""
        return LazyTensor(self.shape, lambda: function(self.read()), self.stored)

    def scaled_rows(self, start: int, stop: int, factor: float) -> "LazyTensor":
        """The same tensor with rows `start` to `stop` multiplied by `factor`."""

        def read() -> np.ndarray:
            values = self.read().astype(np.float32)
            values[start:stop] *= np.float32(factor)
            return values

        return LazyTensor(self.shape, read)


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors one above the other."""
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(
        (rows, *parts[0].shape[1:]),
        lambda: np.concatenate([part.read() for part in parts]),
        _common(parts),
    )


def _common(tensors: Iterable[LazyTensor]) -> InferenceDType:
    types = {tensor.stored for tensor in tensors}
    return types.pop() if len(types) == 1 else "float32"


Tensors = dict[str, LazyTensor]

WRAPPERS = ("_orig_mod.", "module.")
"""Prefixes by torch.compile and DistributedDataParallel."""


def zeros(shape: tuple[int, ...]) -> LazyTensor:
    """Zeros of a shape, for a bias that the source does without."""
    return LazyTensor(shape, lambda: np.zeros(shape, np.float32))


@dataclasses.dataclass
class ForeignCheckpoint:
    """A checkpoint in this project's names and layout, whatever it was before."""

    kind: str
    """What it was recognised as, in words."""
    name: str
    """What to call it in the model card: a hub id, or the last part of a path."""
    config: ModelConfig
    """Resolved."""
    tensors: Tensors
    """Those that `parameter_shapes(config)` names."""
    folder: Path | None = None
    """Where it may have tokenizer files."""
    ends: list[int] = dataclasses.field(default_factory=list)
    """Ids that end a text, where its configuration names any."""

    @property
    def dtype(self) -> InferenceDType:
        """The type of all its tensors; float32 if they differ."""
        return _common(self.tensors.values())

    def weights(self) -> dict[str, np.ndarray]:
        """All tensors, contiguous float32.

        Raises:
            UserError: If one of them has a value that is not finite.
        """
        weights = {}
        for name in parameter_shapes(self.config):
            values = np.ascontiguousarray(self.tensors[name].read(), np.float32)
            if not np.isfinite(values).all():
                raise UserError(
                    f"{self.name}: {name} has values that are not finite; the checkpoint is damaged"
                )
            weights[name] = values
        return weights


def unwrapped(where: object, tensors: Tensors) -> Tensors:
    """Tensors without the prefixes of wrapping modules, which may be nested in any order.

    Raises:
        UserError: If two names then are the same.
    """
    out: Tensors = {}
    for name, tensor in tensors.items():
        while name.startswith(WRAPPERS):
            for prefix in WRAPPERS:
                name = name.removeprefix(prefix)
        if name in out:
            raise UserError(f"{where}: has tensor {name} twice, by names that wrappers gave it")
        out[name] = tensor
    return out


def check_tensors(
    where: object, found: Mapping[str, LazyTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare a checkpoint's tensors with those its configuration asks for, in its own names.

    Raises:
        UserError: Naming the tensors that are missing, unexpected, or of another shape.
    """
    if missing := [n for n in expected if n not in found]:
        raise UserError(f"{where}: missing {_some(missing)}; the checkpoint is incomplete")
    if unexpected := [n for n in found if n not in expected]:
        raise UserError(
            f"{where}: unexpected {_some(unexpected)}; this is not the architecture it claims to be"
        )
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {found[name].shape}, its configuration asks for "
                f"{shape}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def is_tied(
    tensors: Mapping[str, LazyTensor], head: str = HEAD, embedding: str = EMBEDDING
) -> bool:
    """Whether the output head is the embedding; one that is absent is."""
    if head not in tensors or embedding not in tensors:
        return True
    a, b = tensors[head], tensors[embedding]
    return a.shape == b.shape and np.array_equal(a.read(), b.read())


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Number of blocks that tensors named `PREFIX{i}.` make up."""
    indices = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
    return 1 + max((int(i) for i in indices if i.isdecimal()), default=-1)


def resolved(where: object, **values: object) -> ModelConfig:
    """A resolved configuration; UserError naming the file if its values are impossible."""
    return ModelConfig.read(values, str(where))
