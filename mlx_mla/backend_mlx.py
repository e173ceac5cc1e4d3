"""The MLX backend: the training step, the loss, and the model ready to decode."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx_mla._openblas  # noqa: F401  (before mlx)
from mlx_mla.backend import CacheKind, DType, StepResult, Teacher, dropout_seed, stored_moment
from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.decode_mlx import MLXDecoder
from mlx_mla.errors import UserError
from mlx_mla.model_mlx import Model, ModelArgs
from mlx_mla.score_mlx import MLXScorer
from mlx_mla.shards import Batch
from mlx_mla.world import SOLO, World

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


class MLXBackend:
    """Runs the model in MLX, on Metal, CUDA or the CPU."""

    name = "mlx"

    def __init__(self, device: str = "auto"):
        if device in ("mps", "cuda"):
            raise UserError(f"--device {device} goes with --backend torch; for MLX's GPU use --device gpu")
        if device == "gpu" and not mx.is_available(mx.gpu):
            raise UserError("--device gpu: MLX sees no GPU here; use --device cpu or auto")
        if device != "auto":
            mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)

    def train_session(
        self,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None = None,
        steps_done: int = 0,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ) -> "MLXTrainSession":
        return MLXTrainSession(config, weights, optimizer_state, steps_done, teacher, world)

    def decoder(self, folder: Path, cache: CacheKind = "latent") -> MLXDecoder:
        return MLXDecoder(folder, cache)

    def scorer(self, folder: Path, dtype: DType = "float32") -> MLXScorer:
        decoder = MLXDecoder(folder)
        decoder.model.set_dtype(DTYPES[dtype])
        decoder.model.eval()
        return MLXScorer(decoder.model, decoder.tokenizer)


def build_model(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Model:
    """A model with the given float32 weights, in evaluation mode."""
    model = Model(ModelArgs.from_dict(config.to_dict()))
    model.load_weights([(name, mx.array(w)) for name, w in weights.items()])
    model.eval()
    return model


def make_optimizer(config: TrainConfig) -> optim.MultiOptimizer:
    """AdamW with bias correction; decay on matrices only, as in GPT-2 and GPT-3 training."""
    adamw = partial(
        optim.AdamW,
        learning_rate=config.learning_rate,
        betas=[config.beta1, config.beta2],
        eps=config.adam_epsilon,
        bias_correction=True,
    )
    return optim.MultiOptimizer(
        [adamw(weight_decay=config.weight_decay), adamw(weight_decay=0.0)],
        [lambda _, w: w.ndim >= 2],
    )


class MLXTrainSession:
    """See `mlx_mla.backend.TrainSession`.

    Weights, gradients and optimiser state are float32; with bfloat16 the forward and backward pass
    run on a cast of the weights, whose gradient flows back to the float32 ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: Mapping[str, np.ndarray],
        optimizer_state: Mapping[str, np.ndarray] | None,
        steps_done: int,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ):
        mx.reset_peak_memory()
        self.config, self.world = config, world
        self.model = build_model(config.model, weights)
        self.optimizer = make_optimizer(config)
        self.optimizer.init(self.model.trainable_parameters())
        if optimizer_state is not None:
            self._load_optimizer_state(optimizer_state, steps_done)
        self._dtype = DTYPES[config.dtype]
        self._teacher: Model | None = None
        if teacher is not None:
            self._teacher, self._vocabulary = build_model(teacher.config, teacher.weights), teacher.vocabulary
            self._teacher.set_dtype(self._dtype)
        # Everything the compiled functions read or change beside their arguments.
        state = [self.model.state, self.optimizer.state, mx.random.state]
        jit = partial(mx.compile, inputs=state, outputs=state) if config.compile else lambda f: f
        frozen = [] if self._teacher is None else [self._teacher.state]
        grad_jit = partial(mx.compile, inputs=state + frozen, outputs=state) if config.compile else jit
        self._grad_step = grad_jit(self._loss_and_grad)
        self._apply_step = jit(self._clip_and_update)
        self._add = mx.compile(_tree_add) if config.compile else _tree_add
        self._loss_sum = jit(self._summed_loss)
        mx.eval(state)

    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        self.model.train()
        if self.config.model.dropout:
            mx.random.seed(dropout_seed(self.config.seed, step, self.world.rank))
        total, grads = self._grad_step(*map(mx.array, batches[0]))
        for batch in batches[1:]:
            mx.eval(total, grads)  # frees this pass's activations before the next one
            loss, new = self._grad_step(*map(mx.array, batch))
            total, grads = total + loss, self._add(grads, new)
        if self.world.size > 1:
            grads = self.world.engine.average(grads)  # lazy: part of the last pass's graph
        self.optimizer.learning_rate = learning_rate
        norm = self._apply_step(grads, mx.array(1.0 / len(batches)))
        mx.eval(self.model.state, self.optimizer.state, total, norm)
        return StepResult(_number(total) / len(batches), _number(norm))

    def loss_sum(self, batch: Batch) -> float:
        self.model.eval()
        return _number(self._loss_sum(*map(mx.array, batch)))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(w) for name, w in tree_flatten(self.model.parameters())}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return {key: np.array(value) for key, _, _, value in self._moments()}

    def generate(self, prompt: Sequence[int], max_tokens: int, temp: float, seed: int) -> list[int]:
        self.model.eval()
        mx.random.seed(seed)
        steps = generate_step(
            mx.array(list(prompt)), self.model, max_tokens=max_tokens, sampler=make_sampler(temp=temp)
        )
        return [int(token) for token, _ in steps]

    def peak_memory_bytes(self) -> int:
        return mx.get_peak_memory()

    def scorer(self, tokenizer: Any) -> MLXScorer:
        self.model.eval()
        return MLXScorer(self.model, tokenizer)

    def _load_optimizer_state(self, tensors: Mapping[str, np.ndarray], steps_done: int) -> None:
        # Written into the dictionaries that init made, so that each optimiser keeps its own tensors.
        for part in self.optimizer.state["states"]:
            part["step"] = mx.array(steps_done, mx.uint64)
        for key, part, path, value in list(self._moments()):
            _set_path(part, path, mx.array(stored_moment(tensors, key, value.shape)))

    def _moments(self) -> Iterator[tuple[str, dict, str, mx.array]]:
        """AdamW's moments: name on disk, the optimiser's state, the path in it, and the tensor."""
        names = {"m": "exp_avg", "v": "exp_avg_sq"}
        for part in self.optimizer.state["states"]:
            for path, value in tree_flatten(part):
                name, _, moment = path.rpartition(".")
                if moment in names:
                    yield f"{names[moment]}.{name}", part, path, value

    def _forward_loss(self, x: mx.array, y: mx.array) -> mx.array:
        """Cross-entropy of every token, float32 of shape (B, L)."""
        return mx.fast.cross_entropy(self.model(x).astype(mx.float32), y)

    def _distillation_loss(self, x: mx.array, y: mx.array, taught: mx.array) -> mx.array:
        weight, temperature = self.config.teacher_weight, self.config.teacher_temperature
        assert weight is not None and temperature is not None
        logits, ids = self.model(x).astype(mx.float32), slice(self._vocabulary)
        divergence = distillation_divergence(logits[..., ids], taught[..., ids].astype(mx.float32), temperature)
        return (1 - weight) * mx.fast.cross_entropy(logits, y).mean() + weight * divergence

    def _loss_and_grad(self, x: mx.array, y: mx.array) -> tuple[mx.array, dict]:
        master = self.model.trainable_parameters()
        taught = None if self._teacher is None else self._teacher(x)

        def loss_fn(params: dict) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self._dtype), params))
            return self._forward_loss(x, y).mean() if taught is None else self._distillation_loss(x, y, taught)

        loss, grads = mx.value_and_grad(loss_fn)(master)
        self.model.update(master)
        return loss, grads

    def _clip_and_update(self, grads: dict, scale: mx.array) -> mx.array:
        grads = tree_map(lambda g: g * scale, grads)
        if self.config.grad_clip:
            grads, norm = optim.clip_grad_norm(grads, self.config.grad_clip)
        else:
            norm = mx.sqrt(mx.stack([mx.square(g).sum() for _, g in tree_flatten(grads)]).sum())
        self.optimizer.update(self.model, grads)
        return norm

    def _summed_loss(self, x: mx.array, y: mx.array) -> mx.array:
        master = self.model.trainable_parameters()
        self.model.update(tree_map(lambda p: p.astype(self._dtype), master))
        loss = self._forward_loss(x, y).sum()
        self.model.update(master)
        return loss


def distillation_divergence(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
    """T^2 KL(teacher || student) of the softmaxes at temperature T, mean over tokens, nats.

    Args:
        student: Logits, (..., V) float32.
        teacher: The same.
    """
    log_q, log_p = (z - mx.logsumexp(z, -1, keepdims=True) for z in (student / temperature, teacher / temperature))
    return temperature**2 * (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def _number(scalar: mx.array) -> float:
    return cast(float, scalar.item())


def _tree_add(a: dict, b: dict) -> dict:
    return tree_map(mx.add, a, b)


def _set_path(tree: dict, path: str, value: mx.array) -> None:
    """Replace one leaf of nested dictionaries and lists, by its tree_flatten path."""
    *parents, last = path.split(".")
    node = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
