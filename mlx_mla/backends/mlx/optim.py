"""Optimizers in MLX: AdamW, and Muon for the blocks' matrices. Their state is stored by name."""

from collections.abc import Iterator, Mapping
from functools import partial

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from mlx_mla.model.schedule import muon_rate
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import is_hidden_matrix


class Muon(optim.Muon):
    """MLX's Muon (https://kellerjordan.github.io/posts/muon) with decoupled weight decay.

    MLX adds the decay to the gradient, and the orthogonalization then discards its size. This class
    shrinks the weights by `learning_rate * weight_decay` instead, as AdamW does (Moonlight,
    arXiv:2502.16982, equation 3). The Newton-Schulz iteration runs in the gradient's type, float32.
    """

    def __init__(self, learning_rate: float, weight_decay: float):
        super().__init__(learning_rate, weight_decay=0.0)
        self.decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        kept = parameter * (1 - self.learning_rate * self.decay)
        return super().apply_single(gradient, kept, state)


def make_optimizer(config: TrainConfig) -> optim.MultiOptimizer:
    """Create the optimizer of a run.

    AdamW has bias correction and decays only matrices, as in GPT-2 and GPT-3 training. With
    --optimizer muon, Muon updates the blocks' matrices.
    """
    adamw = partial(
        optim.AdamW,
        learning_rate=config.learning_rate,
        betas=[config.beta1, config.beta2],
        eps=config.adam_epsilon,
        bias_correction=True,
    )
    parts = [adamw(weight_decay=config.weight_decay), adamw(weight_decay=0.0)]
    filters = [lambda _, w: w.ndim >= 2]
    if config.optimizer == "muon":
        assert config.muon_learning_rate
        parts.insert(0, Muon(config.muon_learning_rate, config.weight_decay))
        filters.insert(0, lambda name, w: is_hidden_matrix(name, w.ndim))
    return optim.MultiOptimizer(parts, filters)


def set_learning_rate(optimizer: optim.MultiOptimizer, config: TrainConfig, rate: float) -> None:
    """Set AdamW's learning rate. Muon's follows the same schedule."""
    for part in optimizer.optimizers:
        part.learning_rate = muon_rate(config, rate) if isinstance(part, Muon) else rate


def state_tensors(optimizer: optim.MultiOptimizer) -> dict[str, np.ndarray]:
    """The moments, by their names on disk."""
    return {key: np.array(value) for key, _, _, value in _moments(optimizer)}


def load_state(
    optimizer: optim.MultiOptimizer, tensors: Mapping[str, np.ndarray], steps_done: int
) -> None:
    """Restore the result of `state_tensors` into an optimizer after `init`."""
    # Written into the dictionaries that init created, so each optimizer keeps its own tensors.
    for part in optimizer.state["states"]:
        part["step"] = mx.array(steps_done, mx.uint64)
    for key, state, path, _ in list(_moments(optimizer)):
        _set_path(state, path, mx.array(tensors[key]))


def _moments(optimizer: optim.MultiOptimizer) -> Iterator[tuple[str, dict, str, mx.array]]:
    """Yield for each moment: its name on disk, its optimizer's state, its path there, its value."""
    for part in optimizer.optimizers:
        names = {"m": "exp_avg", "v": "exp_avg_sq"}
        if isinstance(part, Muon):
            names = {"v": "momentum_buffer"}
        for path, value in tree_flatten(part.state):
            name, _, moment = path.rpartition(".")
            if moment in names:
                yield f"{names[moment]}.{name}", part.state, path, value


def _set_path(tree: dict, path: str, value: mx.array) -> None:
    """Replace a leaf of nested dictionaries and lists, given its tree_flatten path."""
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
