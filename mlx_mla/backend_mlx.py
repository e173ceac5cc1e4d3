"""The MLX backend: the training step, the loss, and the model ready to decode."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx_mla._openblas  # noqa: F401  (before mlx)
from mlx_mla import loss_mlx, optim_mlx
from mlx_mla.backend import CacheKind, DType, StepResult, Teacher, dropout_seed, physical_memory
from mlx_mla.config import ModelConfig, TrainConfig
from mlx_mla.decode_mlx import MLXDecoder
from mlx_mla.errors import UserError
from mlx_mla.model_mlx import Model, ModelArgs
from mlx_mla.peak import measure_peak
from mlx_mla.score_mlx import MLXScorer
from mlx_mla.shards import Batch
from mlx_mla.world import SOLO, World

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_reduce
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

GIB = 2**30
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

    def memory_bytes(self) -> int:
        info = mx.device_info()
        for key in ("max_recommended_working_set_size", "total_memory"):  # Metal's and CUDA's
            if key in info:
                return int(info[key])
        return physical_memory()

    @property
    def fused_attention(self) -> bool:
        return mx.default_device() == mx.gpu

    @contextlib.contextmanager
    def limited_memory(self, expected: int) -> Iterator[None]:
        if mx.metal.is_available():
            # Wired memory is not paged out; freed buffers may be kept in what the estimate leaves of it.
            whole = self.memory_bytes()
            limits = {mx.set_wired_limit: whole, mx.set_cache_limit: max(whole - expected, GIB // 2)}
        else:
            # A CPU's graph is enqueued, and its memory taken, far ahead of its execution; at the limit that waits.
            limits = {mx.set_memory_limit: expected}
        before = {set_limit: set_limit(value) for set_limit, value in limits.items()}
        try:
            yield
        finally:
            for set_limit, value in before.items():
                set_limit(value)

    def peak_flops(self, dtype: DType, seconds: float = 0.1) -> float:
        def product(n: int) -> Callable[[], None]:
            a, b = (mx.random.normal((n, n), key=mx.random.key(i)).astype(DTYPES[dtype]) for i in (0, 1))
            mx.eval(a, b)
            return lambda: mx.eval(a @ b)

        peak = measure_peak(product, seconds)
        mx.clear_cache()
        return peak

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
        self.optimizer = optim_mlx.make_optimizer(config)
        self.optimizer.init(self.model.trainable_parameters())
        if optimizer_state is not None:
            optim_mlx.load_state(self.optimizer, optimizer_state, steps_done)
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
        optim_mlx.set_learning_rate(self.optimizer, self.config, learning_rate)
        # Evaluated from the updated weights, the graph would be walked in another order than the backward pass's,
        # and hold a quarter more with gradient checkpointing.
        mx.eval(total, grads)
        norm = self._apply_step(grads, mx.array(1.0 / len(batches)))
        del grads  # so that each can go once it is used
        mx.eval(self.model.state, self.optimizer.state, total, norm)
        return StepResult(_number(total) / len(batches), _number(norm))

    def loss_sum(self, batch: Batch) -> float:
        self.model.eval()
        return _number(self._loss_sum(*map(mx.array, batch)))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(w) for name, w in tree_flatten(self.model.parameters())}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return optim_mlx.state_tensors(self.optimizer)

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

    def _hidden(self, x: mx.array) -> mx.array:
        """Last hidden states; with gradients, as --checkpoint-every says."""
        every = self.config.checkpoint_every if self.model.training else 0
        return loss_mlx.hidden_states(self.model.transformer, x, every)

    def _cross_entropy(self, x: mx.array, y: mx.array, gradient: bool) -> mx.array:
        """Summed over all tokens."""
        head = self.model.transformer.wte.weight
        return loss_mlx.head_loss(self._hidden(x), head, y, self.config.loss_chunk or 0, gradient)

    def _distillation_loss(self, x: mx.array, y: mx.array, taught: mx.array) -> mx.array:
        weight, temperature = self.config.teacher_weight, self.config.teacher_temperature
        assert weight is not None and temperature is not None
        logits = self.model.transformer.wte.as_linear(self._hidden(x)).astype(mx.float32)
        ids = slice(self._vocabulary)
        divergence = distillation_divergence(logits[..., ids], taught[..., ids].astype(mx.float32), temperature)
        return (1 - weight) * mx.fast.cross_entropy(logits, y).mean() + weight * divergence

    def _loss_and_grad(self, x: mx.array, y: mx.array) -> tuple[mx.array, dict]:
        master = self.model.trainable_parameters()
        taught = None if self._teacher is None else self._teacher(x)

        def loss_fn(params: dict) -> mx.array:
            self.model.update(tree_map(lambda p: p.astype(self._dtype), params))
            if taught is not None:
                return self._distillation_loss(x, y, taught)
            return self._cross_entropy(x, y, gradient=True) * (1 / y.size)

        loss, grads = mx.value_and_grad(loss_fn)(master)
        self.model.update(master)
        return loss, grads

    def _clip_and_update(self, grads: dict, scale: mx.array) -> mx.array:
        # One product scales and clips, so that one set of gradients is in memory, and not three.
        squares = tree_reduce(lambda total, g: total + mx.square(g).sum(), grads, mx.zeros(()))
        norm = mx.sqrt(squares) * scale
        if self.config.grad_clip:
            scale = scale * mx.minimum(self.config.grad_clip / (norm + 1e-6), 1.0)
        self.optimizer.update(self.model, tree_map(lambda g: g * scale, grads))
        return norm

    def _summed_loss(self, x: mx.array, y: mx.array) -> mx.array:
        master = self.model.trainable_parameters()
        self.model.update(tree_map(lambda p: p.astype(self._dtype), master))
        loss = self._cross_entropy(x, y, gradient=False)
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
