"""Models in MLX, from weights or from a folder."""

import contextlib
import glob
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_mla.backends.mlx.device import DTYPES
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.errors import UserError, first_line
from mlx_mla.model.config import InferenceDType, ModelConfig
from mlx_mla.model.model_mlx import Model, ModelArgs


def build_model(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Model:
    """A model with the given float32 weights, in evaluation mode."""
    model = Model(ModelArgs.from_dict(config.to_dict()))
    model.load_weights([(name, mx.array(w)) for name, w in weights.items()])
    model.eval()
    return model


def load(folder: ModelFolder, dtype: InferenceDType | None = None) -> Model:
    """The package's own model with a folder's weights, also those quantized by `mlx_lm.convert -q`.

    Args:
        dtype: Type of all weights that are not quantized. None: the folder's.

    Raises:
        UserError: If it is another kind of model, mlx-lm cannot load the weights, or one of them is
            not finite.
    """
    folder.weight_files()  # refuses incomplete sets of shards
    try:
        with _without_wildcards(folder.path) as path:
            model, _ = load_model(
                path,
                model_config={"model_file": None},
                get_model_classes=lambda config: (Model, ModelArgs),
            )
    except (ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"{folder}: the weights do not fit config.json: {first_line(e)}") from e
    assert isinstance(model, Model)
    if name := not_finite(model.parameters()):
        raise UserError(
            f"{folder}: tensor {name} has values that are not finite; the model is unusable"
        )
    if dtype is not None:
        model.set_dtype(DTYPES[dtype])
    return model


def not_finite(tree: Any) -> str | None:
    """Name of an array in a tree of them with a value that is NaN or infinite; None if there is
    none."""
    arrays = [(n, v) for n, v in tree_flatten(tree) if mx.issubdtype(v.dtype, mx.floating)]
    # Sums take no memory; where one overflows, it says nothing.
    sums = np.array(mx.stack([v.sum().astype(mx.float32) for _, v in arrays]))
    for (name, values), total in zip(arrays, sums):
        if not np.isfinite(total) and not mx.isfinite(values).all().item():
            return name
    return None


@contextlib.contextmanager
def _without_wildcards(folder: Path) -> Iterator[Path]:
    """A path of the folder that mlx-lm finds the weights by: it takes the name for a pattern."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlx-mla-") as place:
        link = Path(place) / "model"
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield link
