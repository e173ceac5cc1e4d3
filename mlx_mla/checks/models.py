"""Models at every preset's widths: logits and text of a device against MLX on the CPU.

The models are shallow and have random weights, so that a preset takes a second. Whatever runs does
so through `mlx_mla.backends.contract`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlx_mla import checkpoint
from mlx_mla.backends import get_backend
from mlx_mla.backends.contract import Decoder
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.checks.row import Outcome, at_most, row
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.decoding.request import CacheName, GenerationOptions
from mlx_mla.evaluation.scoring import RowBatch, Scorer
from mlx_mla.files import atomic_folder
from mlx_mla.model.config import BackendName, DeviceName, DType, ModelConfig
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights

BOUNDS: dict[DType, float] = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability from float32 on MLX's CPU, in nats. In float32, sums have
other orders on other devices, and exponentials other last digits."""
QUANTIZED = {8: 0.2, 4: 2.0}
"""The same for tokens from a cache in so many bits."""

CACHES: tuple[CacheName, ...] = ("latent", "materialized")
PREFIX, PROMPT = 16, 40
GREEDY = GenerationOptions(temp=0, max_tokens=12)
_REGRET = "worst token below the likeliest, nats:"

_CODE: dict[BackendName, tuple[str, ...]] = {
    "mlx": (
        "mlx_mla/model/model_mlx.py:LatentAttention",
        "mlx_mla/model/model_mlx.py:attend_in_half",
        "mlx_mla/backends/contract.py:GPU_DTYPE",
    ),
    "torch": (
        "mlx_mla/model/model_torch.py:attend",
        "mlx_mla/model/model_torch.py:_attend_absorbed",
    ),
}


@row(
    where={b: (*code, f"mlx_mla/backends/{b}/score.py") for b, code in _CODE.items()},
    expected="the log-probabilities of float32 in MLX on the CPU, to 1e-3 nats in float32 and 0.25 "
    "in bfloat16",
    minutes=0.3,
)
def parity(place: Path, backend: BackendName, device: DeviceName) -> Iterator[Outcome]:
    """Logits on {device} in float32 and bfloat16, at every preset's widths; scoring with a cached
    prefix."""
    there = get_backend(backend, device)
    ids = np.random.default_rng(33).integers(0, 256, (2, 33)).astype(np.int32)
    prefix, rest = ids[:, :PREFIX], ids[:, PREFIX:]
    for name, folder in preset_models(place):
        expected = log_probabilities(_reference(folder), ids, _places(ids))
        for dtype, bound in BOUNDS.items():
            scorer = there.scorer(folder, dtype)
            whole = log_probabilities(scorer, ids, _places(ids))
            after = log_probabilities(scorer, rest, _places(rest), prefix)
            largest = np.abs([whole - expected, after - expected]).max()
            yield at_most(largest, bound, f"log-probabilities in {dtype} differ by", name)


@row(
    where={b: (*code, f"mlx_mla/backends/{b}/decode.py") for b, code in _CODE.items()},
    expected="every token is the likeliest of a full forward pass on the CPU; in bfloat16, to 0.25 "
    "nats",
    minutes=0.6,
)
def decoding(place: Path, backend: BackendName, device: DeviceName) -> Iterator[Outcome]:
    """Greedy text on {device} in float32 with both caches, whose shapes are fixed on MPS, alone and
    in a batch of prompts of unequal lengths; and in bfloat16."""
    there, prompts = get_backend(backend, device), [_prompt(n) for n in (PROMPT, 7, 19)]
    for name, folder in preset_models(place):
        reference = _reference(folder)
        for kind in CACHES if folder.config.attention_spec.latent_widths else CACHES[1:]:
            decoder = there.decoder(folder, kind, "float32")
            texts: list[list[int]] = [[] for _ in prompts]
            for i, piece in decoder.batch(prompts, GREEDY):
                texts[i] += piece.token_ids
            for prompt, text in zip(prompts * 2, [*texts, _tokens(decoder, prompts[0])]):
                lost = regret(reference, prompt, text)
                yield at_most(lost, BOUNDS["float32"], _REGRET, f"{name}, {kind}")
        text = _tokens(there.decoder(folder, "latent", "bfloat16"), prompts[0])
        lost = regret(reference, prompts[0], text)
        yield at_most(lost, BOUNDS["bfloat16"], f"in bfloat16, {_REGRET}", name)


@row(
    where=(
        "mlx_mla/model/model_mlx.py:_attend_absorbed",
        "mlx_mla/model/model_mlx.py:WRITTEN_VALUE",
    ),
    expected="every token is the likeliest of a full forward pass on the CPU",
    minutes=0.3,
)
def absorbed(place: Path) -> Iterator[Outcome]:
    """Several absorbed queries at once: the next part of a prompt, and the check of a draft's
    guesses."""
    prompt, more, draft = _prompt(PROMPT), [5, 80, 9], None
    for name, folder in preset_models(place):
        draft = draft or folder  # the first preset's model, whose guesses are mostly wrong
        if not folder.config.attention_spec.latent_widths:
            continue
        decoder = get_backend("mlx").decoder(folder, "latent", "float32")
        file = place / f"{name}.safetensors"
        first = _tokens(decoder, prompt, save_prompt_cache=file, max_tokens=4)
        texts = [(prompt, first)]
        texts.append(([*prompt, *first, *more], _tokens(decoder, more, prompt_cache=file)))
        for guesses in (draft, folder):  # its own are all right
            texts.append((prompt, _tokens(decoder, prompt, draft_model=str(guesses))))
        for before, text in texts:
            lost = regret(_reference(folder), before, text)
            yield at_most(lost, BOUNDS["float32"], _REGRET, name)


@row(
    where=("mlx_mla/backends/mlx/decode.py:MLXDecoder",),
    expected="tokens at most 0.2 and 2 nats less likely than the best",
    minutes=0.2,
)
def quantized_cache(place: Path) -> Iterator[Outcome]:
    """The cache in 8 and 4 bits (`--kv-bits`)."""
    prompt = _prompt(PROMPT)
    for name, folder in preset_models(place):
        decoder = get_backend("mlx").decoder(folder, "latent", "float32")
        for bits, bound in QUANTIZED.items():
            lost = regret(_reference(folder), prompt, _tokens(decoder, prompt, kv_bits=bits))
            yield at_most(lost, bound, f"{bits} bits: {_REGRET}", name)


def preset_models(place: Path) -> Iterator[tuple[str, ModelFolder]]:
    """(preset, model folder) of each, with its widths."""
    for name in PRESETS:
        yield name, small_model(place / name, name)


def small_config(name: str = "nano", **changes: int) -> ModelConfig:
    """A preset's model of few layers, positions and tokens."""
    model = preset(name).model
    # A narrow MLP: it is no other than a linear layer.
    sizes = {"n_layer": 2, "n_positions": 96, "n_inner": model.n_embd}
    sizes["vocab_size"] = ByteTokenizer.size
    return dataclasses.replace(model, **{**sizes, **changes}).resolved()  # type: ignore[arg-type]


def small_model(folder: Path, name: str = "nano", **changes: int) -> ModelFolder:
    """Write such a model, with random weights that make attention and the next token neither even
    nor certain."""
    config, rng = small_config(name, **changes), np.random.default_rng(0)
    weights = initial_weights(config, seed=0, std=1.5 * config.n_embd**-0.5)
    for key, w in weights.items():
        if w.ndim == 1:
            weights[key] = w + 0.1 * rng.standard_normal(w.shape, dtype=np.float32)
    with atomic_folder(folder) as target:
        checkpoint.write_model(target, config, weights, ByteTokenizer().fast_tokenizer(), "")
    return ModelFolder(folder)


def log_probabilities(
    scorer: Scorer, ids: np.ndarray, at: np.ndarray, prefix: np.ndarray | None = None
) -> np.ndarray:
    """Log-probabilities (K, vocabulary), in nats, of every token after some places of a text.

    Args:
        ids: Token ids (B, L).
        at: Places (K,) in the flattened ids.
        prefix: Token ids (B, P) before them.
    """
    V = len(scorer.tokenizer)
    where, targets = np.repeat(at, V), np.tile(np.arange(V), len(at))
    block = RowBatch(ids, np.arange(len(ids)), where.astype(np.int32), targets.astype(np.int32))
    found, _ = scorer.run(prefix, [block])
    return found.reshape(len(at), V)


def regret(scorer: Scorer, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """By how much the log-probability of a greedy text's tokens was below the best, at most, by a
    forward pass over the whole: 0 where each was the likeliest."""
    ids = np.array([[*prompt, *tokens[:-1]]], np.int32)
    rows = log_probabilities(scorer, ids, np.arange(len(prompt) - 1, ids.size))
    return float((rows.max(-1) - rows[np.arange(len(tokens)), tokens]).max())


def _reference(folder: ModelFolder) -> Scorer:
    return get_backend("mlx", "cpu").scorer(folder)


def _tokens(decoder: Decoder, prompt: Sequence[int], **options: object) -> list[int]:
    """A greedy text."""
    request = dataclasses.replace(GREEDY, **options)  # type: ignore[arg-type]
    return [t for piece in decoder.stream(prompt, request) for t in piece.token_ids]


def _prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 256, length).tolist()


def _places(ids: np.ndarray) -> np.ndarray:
    """Four of the last places of each row, in the flattened ids."""
    B, L = ids.shape
    return np.add.outer(np.arange(B) * L, L - 1 - np.arange(0, 16, 4)).ravel()
