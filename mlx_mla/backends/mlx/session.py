"""Training in MLX: a model, its optimizer and the compiled step."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_reduce
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_mla.backends.contract import Start, StepResult, Teacher, dropout_seed
from mlx_mla.backends.mlx import optim
from mlx_mla.backends.mlx.device import DTYPES, on_device
from mlx_mla.backends.mlx.load import build_model, not_finite
from mlx_mla.backends.mlx.loss import cross_entropy, head_loss, hidden_states
from mlx_mla.backends.mlx.score import MLXScorer
from mlx_mla.data.windows import Batch
from mlx_mla.model.model_mlx import Model
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import is_trained
from mlx_mla.world import SOLO, World

EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight")


class MLXTrainSession:
    """See `mlx_mla.backends.contract.TrainSession`.

    Weights, gradients and optimizer state are float32. With bfloat16, the forward and backward
    passes use a cast copy of the weights, and its gradients flow back to the float32 weights.
    Embeddings are looked up in float32, and the result is cast.
    """

    def __init__(
        self,
        device: mx.Device,
        config: TrainConfig,
        start: Start,
        teacher: Teacher | None = None,
        world: World = SOLO,
    ):
        self.device, self.config, self.world = device, config, world
        self._prepare(start, teacher)

    @on_device
    def _prepare(self, start: Start, teacher: Teacher | None) -> None:
        config = self.config
        mx.reset_peak_memory()
        self.model = build_model(config.model, start.weights)
        self.model.freeze()
        for name, module in self.model.named_modules():
            if is_trained(f"{name}.", config.trainable):
                module.unfreeze(recurse=False)
        self.optimizer = optim.make_optimizer(config)
        self.optimizer.init(self.model.trainable_parameters())
        self._average = self.world.gradient_average([])
        if start.optimizer_state is not None:
            optim.load_state(self.optimizer, start.optimizer_state, start.step)
        self._dtype = DTYPES[config.dtype]
        self._teacher: Model | None = None
        if teacher is not None:
            self._teacher = build_model(teacher.config, teacher.weights)
            self._vocabulary = teacher.vocabulary
            self._teacher.set_dtype(self._dtype)
        # Everything that the compiled functions read or change besides their arguments.
        state = [self.model.state, self.optimizer.state, mx.random.state]
        jit = partial(mx.compile, inputs=state, outputs=state) if config.compile else lambda f: f
        read = state if self._teacher is None else [*state, self._teacher.state]
        grad_jit = partial(mx.compile, inputs=read, outputs=state) if config.compile else jit
        self._grad_step = grad_jit(self._loss_and_grad)
        self._apply_step = jit(self._clip_and_update)
        self._add = mx.compile(_tree_add) if config.compile else _tree_add
        self._loss_sum = jit(self._summed_loss)
        mx.eval(state)

    @on_device
    def step(self, step: int, learning_rate: float, batches: Sequence[Batch]) -> StepResult:
        self.model.train()
        if self.config.model.dropout:
            mx.random.seed(dropout_seed(self.config.seed, step, self.world.rank))
        total, grads = self._grad_step(*map(mx.array, batches[0]))
        for batch in batches[1:]:
            mx.eval(total, grads)  # frees the activations of this pass before the next one
            loss, new = self._grad_step(*map(mx.array, batch))
            total, grads = total + loss, self._add(grads, new)
        grads = self._average.mean(grads)  # lazy: part of the last pass's graph
        optim.set_learning_rate(self.optimizer, self.config, learning_rate)
        # Evaluating the updated weights instead would traverse the graph in an order other than the
        # backward pass's, and hold 25 % more memory with gradient checkpointing.
        mx.eval(total, grads)
        norm = self._apply_step(grads, mx.array(1.0 / len(batches)))
        del grads  # each gradient can then be freed once it is used
        mx.eval(self.model.state, self.optimizer.state, total, norm)
        return StepResult(_number(total) / len(batches), _number(norm))

    @on_device
    def loss_sum(self, batch: Batch) -> float:
        self.model.eval()
        return _number(self._loss_sum(*map(mx.array, batch)))

    @on_device
    def is_finite(self) -> bool:
        return not_finite([self.model.parameters(), self.optimizer.state]) is None

    @on_device
    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(w) for name, w in tree_flatten(self.model.parameters())}

    @on_device
    def optimizer_state(self) -> dict[str, np.ndarray]:
        return optim.state_tensors(self.optimizer)

    @on_device
    def generate(self, prompt: Sequence[int], max_tokens: int, temp: float, seed: int) -> list[int]:
        self.model.eval()
        mx.random.seed(seed)
        steps = generate_step(
            mx.array(list(prompt)),
            self.model,
            max_tokens=max_tokens,
            sampler=make_sampler(temp=temp),
            stream=mx.default_stream(self.device),
        )
        return [int(token) for token, _ in steps]

    def peak_memory_bytes(self) -> int:
        return mx.get_peak_memory()

    def scorer(self, tokenizer: Any) -> MLXScorer:
        self.model.eval()
        return MLXScorer(self.device, self.model, tokenizer)

    def _hidden(self, x: mx.array) -> mx.array:
        """Last hidden states; in training with --activation-checkpointing applied."""
        every = self.config.activation_checkpointing if self.model.training else 0
        return hidden_states(self.model.transformer, x, self._dtype, every)

    def _head(self) -> mx.array:
        """The head's matrix (V, D) in the type of the computation."""
        weight: mx.array = self.model.get("lm_head", self.model.transformer.wte).weight
        return weight.astype(self._dtype)

    def _cast(self, parameters: dict) -> dict:
        """Parameters in the type of the computation, without the embeddings."""

        def cast(path: str, weight: mx.array) -> mx.array:
            return weight if path in EMBEDDINGS else weight.astype(self._dtype)

        return tree_map_with_path(cast, parameters)

    def _cross_entropy(self, x: mx.array, y: mx.array, gradient: bool) -> mx.array:
        """Cross-entropy summed over all tokens."""
        return head_loss(self._hidden(x), self._head(), y, self.config.loss_chunk or 0, gradient)

    def _distillation_loss(self, x: mx.array, y: mx.array, taught: mx.array) -> mx.array:
        weight, temperature = self.config.teacher_weight, self.config.teacher_temperature
        assert weight is not None and temperature is not None
        logits = self._hidden(x) @ self._head().T
        ids = slice(self._vocabulary)
        student, teacher = (z[..., ids].astype(mx.float32) for z in (logits, taught))
        divergence = distillation_divergence(student, teacher, temperature)
        return (1 - weight) * cross_entropy(logits, y).mean() + weight * divergence

    def _loss_and_grad(self, x: mx.array, y: mx.array) -> tuple[mx.array, dict]:
        master, trained = self.model.parameters(), self.model.trainable_parameters()
        taught = None if self._teacher is None else self._teacher(x)

        self.model.update(self._cast(master))

        def loss_fn(params: dict) -> mx.array:
            self.model.update(self._cast(params))
            if taught is not None:
                return self._distillation_loss(x, y, taught)
            return self._cross_entropy(x, y, gradient=True) * (1 / y.size)

        loss, grads = mx.value_and_grad(loss_fn)(trained)
        self.model.update(master)
        return loss, grads

    def _clip_and_update(self, grads: dict, scale: mx.array) -> mx.array:
        # One product scales and clips, so only one set of gradients is in memory instead of three.
        squares = tree_reduce(lambda total, g: total + mx.square(g).sum(), grads, mx.zeros(()))
        norm = mx.sqrt(squares) * scale
        if self.config.grad_clip:
            scale = scale * mx.minimum(self.config.grad_clip / (norm + 1e-6), 1.0)
        self.optimizer.update(self.model, tree_map(lambda g: g * scale, grads))
        return norm

    def _summed_loss(self, x: mx.array, y: mx.array) -> mx.array:
        master = self.model.parameters()
        self.model.update(self._cast(master))
        loss = self._cross_entropy(x, y, gradient=False)
        self.model.update(master)
        return loss


def distillation_divergence(student: mx.array, teacher: mx.array, temperature: float) -> mx.array:
    """T^2 KL(teacher || student) of the softmaxes at temperature T, mean over tokens, in nats.

    Args:
        student: The student's logits, (..., V) float32.
        teacher: The teacher's logits, of the same shape.
        temperature: T.
    """
    log_q, log_p = (
        z - mx.logsumexp(z, -1, keepdims=True)
        for z in (student / temperature, teacher / temperature)
    )
    return temperature**2 * (mx.exp(log_p) * (log_p - log_q)).sum(-1).mean()


def _number(scalar: mx.array) -> float:
    return cast(float, scalar.item())


def _tree_add(a: dict, b: dict) -> dict:
    return tree_map(mx.add, a, b)
