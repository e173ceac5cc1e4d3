"""Model files of llm.c: a header of 256 int32, then each parameter for all layers.

Version 3 holds float32, version 5 bfloat16 (karpathy/llm.c, train_gpt2.cu:
gpt2_write_to_checkpoint; train_gpt2.py: write_tensors). The vocabulary is padded to a multiple of
128.
"""

import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from mlx_mla.errors import UserError
from mlx_mla.model.weights import parameter_shapes

from .foreign import ForeignCheckpoint, LazyTensor, Tensors, resolved

MAGIC = 20240326
HEADER_BYTES = 1024
VERSIONS: dict[int, np.dtype] = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}

PER_LAYER = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)
"""Parameters in the order of the file. Each is stored for all layers before the next begins."""


def read_llmc(path: Path) -> ForeignCheckpoint:
    """Open a model file. The parameters stay on disk until they are read.

    Raises:
        UserError: If the version is unknown, the header is impossible, or the file has another size
            than the header requires.
    """
    with path.open("rb") as f:
        start = f.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES:
        raise UserError(
            f"{path}: shorter than llm.c's header of {HEADER_BYTES} bytes; it is truncated"
        )
    header = np.frombuffer(start, "<i4")
    _, version, n_positions, vocab_size, n_layer, n_head, n_embd, padded = map(int, header[:8])
    if version not in VERSIONS:
        raise UserError(
            f"{path}: llm.c model version {version} is not supported; supported are 3 (fp32) and 5 "
            "(bf16)"
        )
    if padded < vocab_size:
        raise UserError(
            f"{path}: the header says {padded} padded rows for a vocabulary of {vocab_size}; it is "
            "damaged"
        )
    config = resolved(
        path,
        attention="mha",
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=n_positions,
        vocab_size=padded,
    )
    shapes = parameter_shapes(config)
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    names += [f"transformer.h.{i}.{part}" for part in PER_LAYER for i in range(n_layer)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    dtype = VERSIONS[version]
    expected = HEADER_BYTES + dtype.itemsize * sum(math.prod(shapes[n]) for n in names)
    size = path.stat().st_size
    if size != expected:
        raise UserError(
            f"{path}: has {size:,} bytes, but the header requires {expected:,}; it is truncated or "
            "damaged"
        )
    tensors: Tensors = {}
    offset = HEADER_BYTES
    for name in names:
        read = _reader(path, offset, shapes[name], dtype)
        tensors[name] = LazyTensor(shapes[name], read, "float32" if version == 3 else "bfloat16")
        offset += dtype.itemsize * math.prod(shapes[name])
    return ForeignCheckpoint("llm.c", path.name, config, tensors)


def _reader(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        return np.array(np.memmap(path, dtype, "r", offset, shape), np.float32)

    return read
