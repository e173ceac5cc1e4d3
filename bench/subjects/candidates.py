"""The models of a benchmark before they are loaded: at any time one of them is in memory."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from bench import subjects
from bench.subjects.contract import Subject, Trainer, Weights
from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.model.config import ModelConfig, TrainConfig
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights

OUTSIDE = {"mlx": "mlx-lm gpt2", "torch": "transformers GPT-2"}
"""The ecosystem's GPT-2, by backend."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model in a framework, which `load` puts into memory.

    Attributes:
        weights: Name of the model whose weights it has; `model` is another for an outside GPT-2.
    """

    backend: str
    model: str
    weights: str
    config: ModelConfig
    load: Callable[[], Subject]

    def trainer(self, config: TrainConfig, device: str) -> Trainer:
        """A training session of its shape."""
        return subjects.load_trainer(self.backend, config, device)


class Models:
    """The configurations of --models and where their weights are.

    Random weights of presets are written to a temporary folder, so that a model takes memory only
    while it is loaded.

    Args:
        quick: Shrink presets.
        n_positions: Position table of the presets; None: their own.
    """

    def __init__(self, names: tuple[str, ...], quick: bool, n_positions: int | None):
        self._temporary = tempfile.TemporaryDirectory(prefix="bench-")
        self._read: dict[str, Callable[[], Weights]] = {}
        self.configs: dict[str, ModelConfig] = {}
        for i, name in enumerate(names):
            if name not in PRESETS and Path(name).exists():
                self.configs[name], self._read[name] = _folder(name)
                continue
            config = _preset(name, quick, n_positions)
            path = Path(self._temporary.name) / f"{i}.safetensors"
            save_file(initial_weights(config, 0), path)
            self.configs[name] = config
            self._read[name] = functools.partial(load_file, path)

    @property
    def baseline(self) -> str | None:
        """The first model with multi-head attention and nothing beyond GPT-2."""
        return next((n for n, c in self.configs.items() if not c.beyond_gpt2), None)

    def candidates(
        self, backends: tuple[str, ...], dtype: str, device: str, outside: bool
    ) -> list[Candidate]:
        """Every model in every backend; with `outside`, the ecosystem's GPT-2 after ours."""
        found = []
        for name, config in self.configs.items():
            for b in backends:
                how: Any = lambda b=b, n=name, c=config: subjects.load(  # noqa: E731
                    b, n, c, self._read[n](), dtype, device
                )
                found.append(Candidate(b, name, name, config, how))
            if outside and name == self.baseline:
                for b in backends:
                    how = lambda b=b, n=name, c=config: subjects.load_reference(  # noqa: E731
                        b, c, self._read[n](), dtype, device
                    )
                    found.append(Candidate(b, OUTSIDE[b], name, config, how))
        return found


def _folder(name: str) -> tuple[ModelConfig, Callable[[], Weights]]:
    folder = checkpoint.model_folder(Path(name))
    config = checkpoint.read_config(folder)
    if checkpoint.is_quantized(folder):
        raise UserError(
            f"--models {name}: quantised by mlx-lm, which only MLX reads; compare the folder "
            "it was made from"
        )
    return config, lambda: checkpoint.read_weights(folder, config)


def _preset(name: str, quick: bool, n_positions: int | None) -> ModelConfig:
    config = preset(name).resolved().model
    if quick:
        rank = None if config.kv_lora_rank is None else max(8, config.kv_lora_rank // 8)
        small: dict[str, Any] = {"n_layer": 2, "n_head": 3, "n_embd": 96, "n_positions": 128}
        config = dataclasses.replace(
            preset(name).model, **small, vocab_size=512, kv_lora_rank=rank
        ).resolved()
    return dataclasses.replace(config, n_positions=n_positions or config.n_positions)
