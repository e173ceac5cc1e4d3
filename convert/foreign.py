"""A checkpoint that is being read: its configuration, and tensors that are loaded on demand."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mlx_mla.errors import UserError
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.weights import parameter_shapes


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor with a known shape, whose values are read on demand."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """Reads the values."""
    stored: InferenceDType = "float32"
    """Narrowest of our types that represents the values in the file exactly."""

    @property
    def T(self) -> "LazyTensor":
        """The transposed matrix."""
        return LazyTensor(self.shape[::-1], lambda: self.read().T, self.stored)

    def mapped(self, function: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        """The same values, rearranged by `function` within the same shape."""
        return LazyTensor(self.shape, lambda: function(self.read()), self.stored)

    def scaled_rows(self, start: int, stop: int, factor: float) -> "LazyTensor":
        """The same tensor with rows `start` to `stop` multiplied by `factor`."""

        def read() -> np.ndarray:
            values = self.read().astype(np.float32)
            values[start:stop] *= np.float32(factor)
            return values

        return LazyTensor(self.shape, read)


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Concatenate tensors along their first axis."""
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
"""Prefixes that torch.compile and DistributedDataParallel add to names."""


def zeros(shape: tuple[int, ...]) -> LazyTensor:
    """Zeros of a shape, for a bias that the source lacks."""
    return LazyTensor(shape, lambda: np.zeros(shape, np.float32))


@dataclasses.dataclass
class ForeignCheckpoint:
    """A checkpoint of any origin, in this project's names and layout."""

    kind: str
    """The format that it was recognized as, for display."""
    name: str
    """Its name in the model card: a hub id, or the last part of a path."""
    config: ModelConfig
    """The resolved configuration."""
    tensors: Tensors
    """The tensors that `parameter_shapes(config)` lists."""
    folder: Path | None = None
    """The folder that may hold tokenizer files."""
    ends: list[int] = dataclasses.field(default_factory=list)
    """Ids that end a text, if the configuration lists any."""
    changes: list[str] = dataclasses.field(default_factory=list)
    """For the model card: a sentence for each change to the weights beyond renaming."""

    @property
    def dtype(self) -> InferenceDType:
        """The common type of all tensors; float32 if they differ."""
        return _common(self.tensors.values())

    def weights(self) -> dict[str, np.ndarray]:
        """Read all tensors as contiguous float32.

        Raises:
            UserError: If a tensor has a value that is not finite.
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
    """Remove the prefixes of wrapping modules from names. They may be nested in any order.

    Raises:
        UserError: If two tensors then have the same name.
    """
    out: Tensors = {}
    for name, tensor in tensors.items():
        while name.startswith(WRAPPERS):
            for prefix in WRAPPERS:
                name = name.removeprefix(prefix)
        if name in out:
            raise UserError(f"{where}: has tensor {name} twice, under names from wrapping modules")
        out[name] = tensor
    return out


HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def is_tied(tensors: Mapping[str, LazyTensor], embedding: str = EMBEDDING) -> bool:
    """True if the output head is the embedding, or is absent."""
    if HEAD not in tensors or embedding not in tensors:
        return True
    a, b = tensors[HEAD], tensors[embedding]
    return a.shape == b.shape and np.array_equal(a.read(), b.read())


def without_tied_head(where: object, tensors: Tensors, embedding: str = EMBEDDING) -> Tensors:
    """The tensors of a model whose config.json ties its head to the embedding, without that head;
    UserError if the file holds another head."""
    if not is_tied(tensors, embedding):
        raise UserError(
            f"{where}: {HEAD} differs from {embedding}, but config.json says that they are tied; "
            "if the model has its own head, set tie_word_embeddings to false there"
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def is_mask(name: str, tensor: LazyTensor) -> bool:
    """True for the causal mask that some versions of GPT-2 save as a tensor."""
    return name.endswith("attn.bias") and len(tensor.shape) == 4


def count_layers(names: Iterable[str], prefix: str) -> int:
    """Number of blocks with tensors named `PREFIX{i}.`."""
    indices = {n.removeprefix(prefix).split(".")[0] for n in names if n.startswith(prefix)}
    return 1 + max((int(i) for i in indices if i.isdecimal()), default=-1)


def resolved(where: object, **values: object) -> ModelConfig:
    """Create a resolved configuration; UserError that names the file if a value is impossible."""
    return ModelConfig.read(values, str(where))
