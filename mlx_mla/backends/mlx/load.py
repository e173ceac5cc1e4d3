"""Models in MLX, from weights or from a folder."""

import contextlib
import glob
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

from mlx_mla import checkpoint
from mlx_mla.config import ModelConfig
from mlx_mla.errors import UserError
from mlx_mla.model_mlx import Model, ModelArgs


def build_model(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Model:
    """A model with the given float32 weights, in evaluation mode."""
    model = Model(ModelArgs.from_dict(config.to_dict()))
    model.load_weights([(name, mx.array(w)) for name, w in weights.items()])
    model.eval()
    return model


def load(folder: Path) -> Model:
    """The package's own model with a folder's weights, also those quantised by `mlx_lm.convert -q`.

    Raises:
        UserError: If it is another kind of model, or mlx-lm cannot load the weights.
    """
    checkpoint.read_config(folder)  # refuses other kinds of model
    try:
        with _without_wildcards(folder) as path:
            model, _ = load_model(
                path,
                model_config={"model_file": None},
                get_model_classes=lambda config: (Model, ModelArgs),
            )
    except (ValueError, RuntimeError, KeyError) as e:
        raise UserError(f"{folder}: the weights do not fit config.json: {_first_line(e)}") from e
    assert isinstance(model, Model)
    return model


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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
