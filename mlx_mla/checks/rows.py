"""The list of what is checked, in the order in which it runs: what takes least comes first.

docs/untested-on-apple.md is made from it; a row that names CUDA alone is not on that page.
"""

import functools
from collections.abc import Iterator

from mlx_mla.checks import models, programs, training
from mlx_mla.checks.row import Need, Row
from mlx_mla.model.config import BackendName, DeviceName

DEVICES: dict[str, tuple[BackendName, DeviceName, tuple[Need, ...], str]] = {
    "mlx-gpu": ("mlx", "gpu", ("gpu",), "MLX's GPU"),
    "mps": ("torch", "mps", ("torch", "mps"), "PyTorch's MPS"),
    "cuda": ("torch", "cuda", ("torch", "cuda"), "PyTorch's CUDA"),
    "torch-cpu": ("torch", "cpu", ("torch",), "PyTorch's CPU"),
}
"""Devices that are held against MLX on the CPU: backend, its --device, needs, and words."""

_CODE = {
    "mlx": ("mlx_mla/model/model_mlx.py:LatentAttention",),
    "torch": ("mlx_mla/model/model_torch.py:attend",),
}
_TRAINING = {
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
}


def _on_devices() -> Iterator[Row]:
    for key, (backend, device, needs, words) in DEVICES.items():
        code = _CODE[backend]
        yield Row(
            name=f"parity-{key}",
            what=f"Logits on {words}, in float32 at every preset's widths; scoring with a cached "
            "prefix",
            where=(*code, f"mlx_mla/backends/{backend}/score.py"),
            needs=needs,
            expected="the log-probabilities of MLX on the CPU, to 1e-3",
            minutes=0.3,
            run=functools.partial(models.parity, backend=backend, device=device),
        )
        fixed = " and caches of fixed shape" if key == "mps" else ""
        yield Row(
            name=f"decoding-{key}",
            what=f"Greedy text on {words} with both caches{fixed}, alone and in a batch",
            where=(*code, f"mlx_mla/backends/{backend}/decode.py"),
            needs=needs,
            expected="every token is the likeliest of a full forward pass on the CPU",
            minutes=0.6,
            run=functools.partial(models.decoding, backend=backend, device=device),
        )
        yield Row(
            name=f"training-{key}",
            what=f"Training steps on {words} in float32; short sequences; keys wider than values; "
            "Muon, recomputed activations and the loss in chunks",
            where=_TRAINING[backend],
            needs=needs,
            expected="the losses of MLX on the CPU, to 0.01 nats",
            minutes=0.3,
            run=functools.partial(training.losses, backend=backend, device=device),
        )


_HALF = {
    "mlx": ("mlx_mla/model/model_mlx.py:attend_in_half", "mlx_mla/backends/contract.py:GPU_DTYPE"),
    "torch": ("mlx_mla/model/model_torch.py:_attend_absorbed",),
}


def _in_half_precision() -> Iterator[Row]:
    backends: dict[BackendName, tuple[Need, ...]] = {"mlx": (), "torch": ("torch",)}
    for backend, needs in backends.items():
        yield Row(
            name=f"bfloat16-{backend}",
            what=f"Logits and text in bfloat16, {backend} on the device that it takes by itself",
            where=_HALF[backend],
            needs=needs,
            expected="log-probabilities of float32, to 0.25 nats; tokens as near to the likeliest",
            minutes=0.3,
            run=functools.partial(models.half_precision, backend=backend, device="auto"),
        )
        yield Row(
            name=f"bfloat16-training-{backend}",
            what=f"Training steps in bfloat16, {backend} on the device that it takes by itself",
            where=(f"mlx_mla/backends/{backend}/session.py",),
            needs=needs,
            expected="the losses of float32, to 0.05 nats",
            minutes=0.2,
            run=functools.partial(training.half_precision, backend=backend, device="auto"),
        )


_OTHERS = (
    Row(
        name="facts",
        what="Processor, memory limit, BLAS and matrix rates in the doctor",
        where=(
            "mlx_mla/machine.py:processor",
            "mlx_mla/backends/blas.py:in_use",
            "mlx_mla/backends/mlx/backend.py:device_info",
            "mlx_mla/backends/peak.py:measure_peak",
        ),
        expected="Metal and Accelerate on a Mac; rates near what is published for the chip",
        minutes=0.1,
        run=programs.facts,
    ),
    Row(
        name="fused-kernels",
        what="Fused decoding: latents as one shared key head of Metal's decode kernel, at every "
        "width that counts on it, in three types",
        where=("mlx_mla/model/model_mlx.py:FUSED_SHARED_HEAD",),
        needs=("metal",),
        expected="fused at all of them, and exact to the type's rounding",
        minutes=0.1,
        run=programs.fused_kernels,
    ),
    Row(
        name="fused-decoding",
        what="The same in the model: logits through the fused and the unfused path",
        where=("mlx_mla/model/model_mlx.py:FUSED_SHARED_HEAD",),
        needs=("metal",),
        expected="the same logits to 1e-3",
        minutes=0.1,
        run=programs.fused_decoding,
    ),
    Row(
        name="quantised-cache",
        what="The cache in 8 and 4 bits (`--kv-bits`)",
        where=("mlx_mla/backends/mlx/decode.py:MLXDecoder",),
        expected="tokens at most 0.2 and 2 nats less likely than the best",
        minutes=0.2,
        run=models.quantised_cache,
    ),
    Row(
        name="absorbed",
        what="Several absorbed queries at once: the next part of a prompt, and the check of a "
        "draft's guesses",
        where=(
            "mlx_mla/model/model_mlx.py:_attend_absorbed",
            "mlx_mla/model/model_mlx.py:WRITTEN_VALUE",
        ),
        expected="every token is the likeliest of a full forward pass on the CPU",
        minutes=0.3,
        run=models.absorbed,
    ),
    Row(
        name="devices",
        what="`--device cpu` and `auto`: training, and generation with a cache in 8 bits; wired "
        "memory on Metal",
        where=(
            "mlx_mla/backends/mlx/backend.py:limited_memory",
            "mlx_mla/backends/mlx/backend.py:memory_bytes",
            "mlx_mla/backends/mlx/device.py:stream_of",
        ),
        expected="text from both",
        minutes=0.3,
        run=programs.both_devices,
    ),
    Row(
        name="server",
        what="`mlx_mla.serve` under four clients, one of whose requests is wrong",
        where=("mlx_mla/serve.py:Handler",),
        expected="each gets the text that it gets alone, the wrong one a 400",
        minutes=0.3,
        run=programs.server,
    ),
    Row(
        name="resume",
        what="Exact resuming: a run that is killed and resumed",
        where=(
            "mlx_mla/training/loop.py",
            "mlx_mla/backends/mlx/loss.py:EMBEDDING_STREAM",
        ),
        expected="bit-identical weights and moments",
        minutes=0.3,
        run=training.resume,
    ),
    Row(
        name="resume-torch",
        what="The same in PyTorch, on MPS or CUDA where it is",
        where=("mlx_mla/training/loop.py", "mlx_mla/backends/torch/session.py"),
        needs=("torch",),
        expected="bit-identical weights and moments",
        minutes=0.3,
        run=functools.partial(training.resume, backend="torch"),
    ),
    Row(
        name="ring",
        what="Data parallel on one machine: two ranks on an MLX ring over loopback, gradients "
        "averaged on the CPU's stream",
        where=("mlx_mla/backends/mlx/ranks.py:MLXEngine",),
        expected="the losses of one process, to 1e-4 nats",
        minutes=0.3,
        run=training.ring,
    ),
    Row(
        name="cache-choice",
        what="`--cache latent` is the default; only on CPUs was it measured to be the faster one",
        where=("mlx_mla/decoding/request.py:cache_of",),
        expected="reports the speed of both caches",
        minutes=0.3,
        run=models.cache_choice,
    ),
    Row(
        name="calibration",
        what="Calibration of `convert --to mla` on MPS, which has no float64",
        where=("convert/calibration.py:collect_moments",),
        needs=("torch", "mps"),
        expected="models with the same score to 0.01 nats",
        minutes=0.5,
        run=programs.calibration,
    ),
    Row(
        name="memory",
        what="Memory of a training step against the estimate, and its share of the measured "
        "matrix rate (MFU)",
        where=(
            "mlx_mla/model/estimate.py:_peak_of_pass",
            "mlx_mla/model/fusion.py:fused_by_mlx",
            "mlx_mla/backends/mlx/backend.py:peak_flops",
        ),
        needs=("compiler",),
        expected="within 15 % of the estimate; on an idle machine an MFU below 100 %",
        minutes=2,
        run=training.memory,
    ),
    Row(
        name="benchmark",
        what="MLX against PyTorch in the benchmark, `compare_backends --quick`",
        where=(
            "bench/compare_backends.py:Bench",
            "bench/subjects/torch.py",
            "mlx_mla/backends/torch/device.py:peak_memory_bytes",
        ),
        needs=("checkout", "torch"),
        expected="logits agree, every row is measured",
        minutes=3,
        run=programs.benchmark,
    ),
)

ROWS: tuple[Row, ...] = tuple(
    sorted((*_OTHERS, *_on_devices(), *_in_half_precision()), key=lambda row: row.minutes)
)
