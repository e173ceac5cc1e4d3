"""Optimizers in PyTorch: AdamW, and Muon for the blocks' matrices. Their state is stored by
name."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mlx_mla.model.schedule import muon_rate
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import is_hidden_matrix

MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def fuses(device: torch.device) -> bool:
    """True if AdamW is fused on the device.

    It is not fused on the CPU, where that would change the last bit of the losses.
    """
    return device.type in ("cuda", "mps")


class Optimizers:
    """AdamW with decay on matrices only. With --optimizer muon, PyTorch's Muon updates the blocks'
    matrices.

    PyTorch's Muon has decoupled weight decay. It iterates in bfloat16, for which its polynomial was
    designed.

    Args:
        config: The resolved settings of the run.
        parameters: The model's parameters by name.
    """

    def __init__(self, config: TrainConfig, parameters: Mapping[str, torch.nn.Parameter]):
        self.config = config
        self._names = {p: name for name, p in parameters.items()}
        hidden = []
        if config.optimizer == "muon":
            hidden = [p for name, p in parameters.items() if is_hidden_matrix(name, p.ndim)]
        taken = set(hidden)
        matrices = [p for p in parameters.values() if p.ndim >= 2 and p not in taken]
        others = [p for p in parameters.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.adam_epsilon,
            fused=fuses(next(iter(parameters.values())).device),
        )
        self._all: list[Any] = [self._adamw]
        if hidden:
            assert config.muon_learning_rate
            self._all.append(
                torch.optim.Muon(hidden, config.muon_learning_rate, config.weight_decay)
            )

    def step(self, rate: float) -> None:
        """Take a step at AdamW's learning rate, and clear the gradients.

        Muon's learning rate follows the same schedule.
        """
        for optimizer in self._all:
            own = rate if optimizer is self._adamw else muon_rate(self.config, rate)
            for group in optimizer.param_groups:
                group["lr"] = own
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, np.ndarray]:
        """The moments as numpy arrays, by their names on disk."""
        return {name: m.detach().cpu().numpy().copy() for name, m in self.moments().items()}

    def moments(self) -> dict[str, torch.Tensor]:
        """The moments on the device, by their names on disk."""
        return {
            f"{moment}.{self._names[p]}": optimizer.state[p][moment]
            for optimizer, p in self._owned()
            for moment in MOMENTS[type(optimizer)]
        }

    def load_state(self, tensors: Mapping[str, np.ndarray], steps_done: int) -> None:
        """Restore the result of `state_tensors`."""
        for optimizer, p in self._owned():
            state: dict[str, Any] = {
                moment: torch.tensor(tensors[f"{moment}.{self._names[p]}"], device=p.device)
                for moment in MOMENTS[type(optimizer)]
            }
            if optimizer is self._adamw:
                # Fused AdamW keeps its step count on the device.
                state["step"] = torch.tensor(
                    float(steps_done), device=p.device if fuses(p.device) else None
                )
            optimizer.state[p] = state

    def _owned(self) -> list[tuple[Any, torch.nn.Parameter]]:
        return [(o, p) for o in self._all for group in o.param_groups for p in group["params"]]
