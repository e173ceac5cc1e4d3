"""Training on a device: its losses against MLX on the CPU, its memory against the estimate, and
runs that stop and resume."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Backend, Start
from mlx_mla.checks import commands
from mlx_mla.checks.models import small_config
from mlx_mla.checks.row import Outcome, at_most, row
from mlx_mla.data.corpus import BUILTIN, read_documents
from mlx_mla.data.windows import Batch
from mlx_mla.model.config import BackendName, DeviceName, DType
from mlx_mla.model.estimate import estimate
from mlx_mla.model.presets import preset
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights
from mlx_mla.training.metrics import METRICS, read_metrics

STEPS, RATE = 12, 2e-3
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.05}
"""Largest difference of a step's loss from float32 on MLX's CPU, in nats: each step grows what the
last ones' rounding left."""
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "8 tokens": {"seq_len": 8},  # of few queries some kernels have no gradient
    "keys wider than values": {"model": {"qk_rope_head_dim": 64}},  # which are then padded
    "Muon, recomputing, loss in chunks": {
        "optimizer": "muon",
        "activation_checkpointing": 1,
        "loss_chunk": 48,
    },
    "bfloat16": {"dtype": "bfloat16"},
}
NEAR = 0.15
"""Share by which the memory of a step may differ from the estimate."""

SMALL = ("--n-layer", "2", "--n-positions", "64", "--batch-size", "4", "--sample-tokens", "0",
         "--eval-every", "0", "--final-eval-batches", "2", "--log-every", "1")  # fmt: skip


@row(
    where={
        "mlx": (
            "mlx_mla/backends/mlx/session.py",
            "mlx_mla/backends/mlx/loss.py",
            "mlx_mla/model/model_mlx.py:differentiable_mask",
            "mlx_mla/model/model_mlx.py:fusible",
        ),
        "torch": (
            "mlx_mla/backends/torch/session.py",
            "mlx_mla/backends/torch/loss.py",
            "mlx_mla/backends/torch/optim.py:fuses",
        ),
    },
    expected="the losses of float32 in MLX on the CPU, to 0.01 nats in float32 and 0.05 in "
    "bfloat16",
    minutes=0.5,
)
def training(place: Path, backend: BackendName, device: DeviceName) -> Iterator[Outcome]:
    """Training steps on {device} in float32 and bfloat16; short sequences; keys wider than values;
    Muon, recomputed activations and the loss in chunks."""
    for name, changes in VARIANTS.items():
        config = small_training(**changes)
        expected = losses(get_backend("mlx", "cpu"), dataclasses.replace(config, dtype="float32"))
        found = losses(get_backend(backend, device), config)
        yield compared(found, expected, TOLERANCE[config.dtype], name)


@row(
    where=(
        "mlx_mla/model/estimate.py:_peak_of_pass",
        "mlx_mla/model/fusion.py:fused_by_mlx",
        "mlx_mla/backends/mlx/backend.py:peak_flops",
    ),
    needs=("compiler",),
    expected="within 15 % of the estimate; on an idle machine an MFU below 100 %",
    minutes=2,
)
def memory(place: Path) -> Iterator[Outcome]:
    """Memory of a training step against the estimate, and its share of the measured matrix rate
    (MFU)."""
    # The MFU is for the reader: a machine that does other work while one of the two rates is
    # measured gives any.
    backend = get_backend("mlx")
    bases = [
        dataclasses.replace(preset(name), batch_size=1, tokens_per_step=None)
        for name in ("mla-124m", "mla-124m-rope")
    ]
    if not backend.fused_attention(bases[0].resolved()):
        bases = [preset("nano")]  # a CPU has no time for the large ones
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    for base, dtype in itertools.product(bases, dtypes):
        gc.collect()  # a session and its compiled step name each other
        config = dataclasses.replace(base, dtype=dtype).resolved()
        rate = backend.peak_flops(config.dtype)
        costs = estimate(config, backend.fused_attention(config))
        with backend.limited_memory(costs.total_bytes):
            session = backend.train_session(config, Start(initial_weights(config.model, 0)))
            batch = text_batch(config, 0)
            for step in range(3):
                began = time.perf_counter()
                session.step(step, 1e-4, [batch])
            seconds = time.perf_counter() - began
            peak = session.peak_memory_bytes()
            del session
        off = peak / costs.total_bytes - 1
        mfu = costs.train_flops_per_token * config.step_tokens / seconds / rate
        yield Outcome(
            abs(off) <= NEAR,
            f"{config.preset} in {dtype}: peak {peak / 2**20:,.0f} MiB, {off:+.1%} of the estimate "
            f"(within {NEAR:.0%}), MFU {mfu:.0%}",
        )


@row(
    where={
        "mlx": ("mlx_mla/training/loop.py", "mlx_mla/backends/mlx/loss.py:EMBEDDING_STREAM"),
        "torch": ("mlx_mla/training/loop.py", "mlx_mla/backends/torch/session.py"),
    },
    expected="bit-identical weights and moments",
    minutes=0.3,
)
def resume(place: Path, backend: BackendName, device: DeviceName) -> Iterator[Outcome]:
    """Exact resuming on {device}: a run that is killed and resumed."""
    framework = ("--backend", backend, "--device", device)
    flags = (*SMALL, *framework, "--steps", "100", "--save-every", "10")
    straight, broken = place / "straight", place / "broken"
    commands.run("mlx_mla.train", *flags, "--out", straight)
    with commands.started("mlx_mla.train", *flags, "--out", broken) as process:
        while process.poll() is None and checkpoint.latest(broken) is None:
            time.sleep(0.005)
        if process.poll() is not None:
            raise RuntimeError("the run ended before it could be killed")
    commands.run("mlx_mla.train", "--resume", "--out", broken)
    first, second = (_tensors(folder) for folder in (straight, broken))
    same = sum(first[n].tobytes() == second[n].tobytes() for n in first)
    largest = max(float(np.abs(first[n] - second[n]).max()) for n in first)
    yield Outcome(
        same == len(first),
        f"{same} of {len(first)} tensors of weights and moments are bit-identical, largest "
        f"difference {largest:.2g}",
    )


@row(
    where=("mlx_mla/backends/mlx/ranks.py:MLXEngine",),
    expected="the losses of one process, to 1e-4 nats",
    minutes=0.3,
)
def ring(place: Path) -> Iterator[Outcome]:
    """Data parallel on one machine: two ranks on an MLX ring over loopback, gradients averaged on
    the CPU's stream."""
    flags = (*SMALL, "--steps", "8", "--save-every", "0", "--grad-accum-steps", "2")
    commands.run("mlx_mla.train", *flags, "--out", place / "one")
    commands.ranks(place, 2, "mlx_mla.train", *flags, "--out", place / "two")
    one, two = (
        [r["loss"] for r in read_metrics(place / run / METRICS) if "loss" in r]
        for run in ("one", "two")
    )
    yield compared(two, one, 1e-4, "two ranks")


def small_training(model: Mapping[str, Any] = {}, **changes: Any) -> TrainConfig:
    """Settings to train a small model of nano with."""
    shape = small_config(n_positions=64, **model)
    return dataclasses.replace(preset("nano"), model=shape, **changes).resolved()


def losses(backend: Backend, config: TrainConfig) -> list[float]:
    """The loss of each step, and at the end that of text which was not trained on."""
    session = backend.train_session(
        config, Start(initial_weights(config.model, config.seed, config.initializer_range))
    )
    found = [session.step(i, RATE, [text_batch(config, i)]).loss for i in range(STEPS)]
    held_out = text_batch(config, STEPS)
    return [*found, session.loss_sum(held_out) / held_out[0].size]


def text_batch(config: TrainConfig, step: int) -> Batch:
    """Some bytes of English."""
    text = "\n".join(read_documents(BUILTIN)).encode()
    size = config.batch_size * (config.context + 1)
    ids = np.frombuffer(text[step * size : (step + 1) * size], np.uint8).astype(np.int32)
    rows = ids.reshape(config.batch_size, -1)
    return rows[:, :-1], rows[:, 1:]


def compared(found: list[float], expected: list[float], bound: float, of: str) -> Outcome:
    """Losses against those of another run."""
    assert len(found) == len(expected) > 0
    largest = np.abs(np.subtract(found, expected)).max()
    from_to = f"{of}: {expected[0]:.3f} to {found[-1]:.3f} nats"
    return at_most(largest, bound, f"{from_to}; losses differ by at most")


def _tensors(run: Path) -> dict[str, np.ndarray]:
    """Weights and moments of a run's last checkpoint."""
    folder = checkpoint.latest(run)
    assert folder is not None
    config = checkpoint.ModelFolder(folder).config
    state, _ = checkpoint.read_train_state(folder, TrainConfig(model=config))
    return {**checkpoint.ModelFolder(folder).weights(config), **state}
