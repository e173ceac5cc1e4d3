"""The registry of subjects: every model of --models in every framework, and their references.

`framework` imports mlx.py or torch.py on demand. A `Candidate` is a subject before it is
loaded: at any time one of them is in memory.
"""

import dataclasses
import functools
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from bench.subjects.contract import Subject, Weights
from mlx_mla import checkpoint
from mlx_mla.errors import UserError
from mlx_mla.model.config import BackendName, ModelConfig
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights

OUTSIDE = {"mlx": "mlx-lm gpt2", "torch": "transformers GPT-2"}
"""The ecosystem's GPT-2, by backend."""


def framework(backend: str) -> Any:
    """The module of a backend, mlx.py or torch.py; both have the same functions.

    Raises:
        UserError: If a package that it needs is missing.
    """
    try:
        return importlib.import_module(f"bench.subjects.{backend}")
    except ModuleNotFoundError as e:
        raise UserError(
            f"backend {backend}: {e.name} is not installed; pip install {e.name}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model in a framework, which `load` puts into memory.

    Attributes:
        weights: Name of the model whose weights it has; `model` is another for an outside GPT-2.
    """

    backend: BackendName
    model: str
    weights: str
    config: ModelConfig
    load: Callable[[], Subject]


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
            self.configs[name] = config = _preset(name, quick, n_positions)
            path = Path(self._temporary.name) / f"{i}.safetensors"
            save_file(initial_weights(config, 0), path)
            self._read[name] = functools.partial(load_file, path)

    @property
    def baseline(self) -> str | None:
        """The first model with multi-head attention and nothing beyond GPT-2."""
        return next((n for n, c in self.configs.items() if not c.beyond_gpt2), None)

    def candidates(
        self, backends: Sequence[BackendName], dtype: str, device: str, outside: bool
    ) -> list[Candidate]:
        """Every model in every backend; with `outside`, the ecosystem's GPT-2 after ours."""

        def candidate(b: BackendName, name: str, own: bool) -> Candidate:
            config, model = self.configs[name], name if own else OUTSIDE[b]

            def load() -> Subject:
                weights = self._read[name]()
                subject: Subject = framework(b).load(model, config, weights, dtype, device, own)
                return subject

            return Candidate(b, model, name, config, load)

        return [
            candidate(b, name, own)
            for name in self.configs
            for own in ((True, False) if outside and name == self.baseline else (True,))
            for b in backends
        ]


def _folder(name: str) -> tuple[ModelConfig, Callable[[], Weights]]:
    folder = checkpoint.model_folder(Path(name))
    model = checkpoint.ModelFolder(folder)
    if model.is_quantized:
        raise UserError(
            f"--models {name}: quantized by mlx-lm, which only MLX reads; compare the folder "
            "it was made from"
        )
    return model.config, model.weights


def _preset(name: str, quick: bool, n_positions: int | None) -> ModelConfig:
    config = preset(name).resolved().model
    if quick:
        rank = None if config.kv_lora_rank is None else max(8, config.kv_lora_rank // 8)
        small: dict[str, Any] = {"n_layer": 2, "n_head": 3, "n_embd": 96, "n_positions": 128}
        config = dataclasses.replace(
            preset(name).model, **small, vocab_size=512, kv_lora_rank=rank
        ).resolved()
    return dataclasses.replace(config, n_positions=n_positions or config.n_positions)
