"""Training on a device: its losses against MLX on the CPU, its memory against the estimate, and
runs that stop and resume."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Backend, Start
from mlx_mla.checks import commands
from mlx_mla.checks.row import Outcome, at_most, together
from mlx_mla.data.corpus import BUILTIN, read_documents
from mlx_mla.data.windows import Batch
from mlx_mla.model.config import BackendName, DeviceName, DType
from mlx_mla.model.estimate import estimate
from mlx_mla.model.presets import preset
from mlx_mla.model.train_config import TrainConfig
from mlx_mla.model.weights import initial_weights
from mlx_mla.training.metrics import METRICS, read_metrics

STEPS, RATE = 12, 2e-3
TOLERANCE = 1e-2
"""Largest difference of a step's loss between devices in float32, in nats: each step grows what
the last ones' rounding left."""
BFLOAT16 = 0.05
VARIANTS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "8 tokens": {"seq_len": 8},  # of few queries some kernels have no gradient
    "keys wider than values": {"model": {"qk_rope_head_dim": 64}},  # which are then padded
    "Muon, recomputing, loss in chunks": {
        "optimizer": "muon",
        "activation_checkpointing": 1,
        "loss_chunk": 48,
    },
}
NEAR = 0.15
"""Share by which the memory of a step may differ from the estimate."""

SMALL = ("--n-layer", "2", "--n-positions", "64", "--batch-size", "4", "--sample-tokens", "0",
         "--eval-every", "0", "--final-eval-batches", "2", "--log-every", "1")  # fmt: skip


def losses(place: Path, backend: BackendName, device: DeviceName) -> Outcome:
    """Compiled steps of float32 on a device, plain and with what changes them."""
    found = {}
    for name, changes in VARIANTS.items():
        config = _config(**changes)
        expected = _train(get_backend("mlx", "cpu"), config)
        got = _train(get_backend(backend, device), config)
        found[name] = _compared(got, expected, TOLERANCE)
    return together(found)


def half_precision(place: Path, backend: BackendName, device: DeviceName) -> Outcome:
    """Steps of bfloat16 on a device against its own in float32."""
    there = get_backend(backend, device)
    expected = _train(there, _config())
    return _compared(_train(there, _config(dtype="bfloat16")), expected, BFLOAT16)


def memory(place: Path) -> Outcome:
    """The peak of a step against the estimate. The share of the measured matrix rate (MFU) is for
    the reader: a machine that does other work while one of the two is timed gives any."""
    backend = get_backend("mlx")
    large = [
        dataclasses.replace(preset(name), batch_size=1, tokens_per_step=None)
        for name in ("mla-124m", "mla-124m-rope")
    ]
    # A CPU has no time for them.
    bases = large if backend.fused_attention(large[0].resolved()) else [preset("nano")]
    dtypes: tuple[DType, ...] = ("float32", "bfloat16")
    found = {}
    for base, dtype in itertools.product(bases, dtypes):
        gc.collect()  # a session and its compiled step name each other
        config = dataclasses.replace(base, dtype=dtype).resolved()
        rate = backend.peak_flops(config.dtype)
        costs = estimate(config, backend.fused_attention(config))
        with backend.limited_memory(costs.total_bytes):
            session = backend.train_session(config, Start(initial_weights(config.model, 0)))
            batch = _batch(config, 0)
            for step in range(3):
                began = time.perf_counter()
                session.step(step, 1e-4, [batch])
            seconds = time.perf_counter() - began
            peak = session.peak_memory_bytes()
            del session
        off = peak / costs.total_bytes - 1
        mfu = costs.train_flops_per_token * config.step_tokens / seconds / rate
        found[f"{config.preset} in {dtype}"] = Outcome(
            abs(off) <= NEAR,
            f"peak {peak / 2**20:,.0f} MiB, {off:+.1%} of the estimate (within {NEAR:.0%}), MFU "
            f"{mfu:.0%}",
        )
    return together(found)


def resume(place: Path, backend: BackendName = "mlx") -> Outcome:
    """A run that is killed and resumed, against the run that never stopped."""
    flags = (*SMALL, "--steps", "100", "--save-every", "10", "--backend", backend)
    straight, broken = place / "straight", place / "broken"
    commands.run("mlx_mla.train", *flags, "--out", straight)
    with commands.started("mlx_mla.train", *flags, "--out", broken) as process:
        while process.poll() is None and checkpoint.latest(broken) is None:
            time.sleep(0.005)
        if process.poll() is not None:
            return Outcome(False, "the run ended before it could be killed")
        process.kill()
    commands.run("mlx_mla.train", "--resume", "--out", broken)
    first, second = (_tensors(folder) for folder in (straight, broken))
    differing = [n for n in first if first[n].tobytes() != second[n].tobytes()]
    if not differing:
        return Outcome(True, f"all {len(first)} tensors of weights and moments are bit-identical")
    largest = max(float(np.abs(first[n] - second[n]).max()) for n in differing)
    return Outcome(False, f"{len(differing)} of {len(first)} tensors differ, at most {largest:.2g}")


def ring(place: Path) -> Outcome:
    """Two processes of this machine, which average gradients over loopback, against one."""
    flags = (*SMALL, "--steps", "8", "--save-every", "0", "--grad-accum-steps", "2")
    commands.run("mlx_mla.train", *flags, "--out", place / "one")
    commands.ranks(place, 2, "mlx_mla.train", *flags, "--out", place / "two")
    one, two = ([row["loss"] for row in _rows(place / run)] for run in ("one", "two"))
    return _compared(two, one, 1e-4)


def _config(model: Mapping[str, Any] = {}, **changes: Any) -> TrainConfig:
    base = preset("nano")
    shape = dataclasses.replace(base.model, n_layer=2, n_positions=64, **model)
    return dataclasses.replace(base, model=shape, **changes).resolved()


def _train(backend: Backend, config: TrainConfig) -> list[float]:
    """The loss of each step, and at the end that of text which was not trained on."""
    session = backend.train_session(
        config, Start(initial_weights(config.model, config.seed, config.initializer_range))
    )
    found = [session.step(i, RATE, [_batch(config, i)]).loss for i in range(STEPS)]
    held_out = _batch(config, STEPS)
    return [*found, session.loss_sum(held_out) / held_out[0].size]


def _batch(config: TrainConfig, step: int) -> Batch:
    """Some bytes of English."""
    text = "\n".join(read_documents(BUILTIN)).encode()
    size = config.batch_size * (config.context + 1)
    ids = np.frombuffer(text[step * size : (step + 1) * size], np.uint8).astype(np.int32)
    rows = ids.reshape(config.batch_size, -1)
    return rows[:, :-1], rows[:, 1:]


def _compared(found: list[float], expected: list[float], bound: float) -> Outcome:
    assert len(found) == len(expected) > 0
    largest = float(np.abs(np.subtract(found, expected)).max())
    return at_most(
        largest, bound, f"{expected[0]:.3f} to {found[-1]:.3f} nats; losses differ by at most"
    )


def _tensors(run: Path) -> dict[str, np.ndarray]:
    """Weights and moments of a run's last checkpoint."""
    folder = checkpoint.latest(run)
    assert folder is not None
    config = checkpoint.ModelFolder(folder).config
    state, _ = checkpoint.read_train_state(folder, config)
    return {**checkpoint.ModelFolder(folder).weights(config), **state}


def _rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run / METRICS) if "loss" in row]
