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
from mlx_mla.backends.contract import Backend, Decoder
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.checks.row import Outcome, at_most, together
from mlx_mla.data.tokenizer import ByteTokenizer
from mlx_mla.decoding.request import CacheName, GenerationOptions
from mlx_mla.evaluation.scoring import RowBatch, Scorer
from mlx_mla.files import atomic_folder
from mlx_mla.model.config import BackendName, DeviceName, DType, ModelConfig
from mlx_mla.model.presets import PRESETS, preset
from mlx_mla.model.weights import initial_weights

TOLERANCE = 1e-3
"""Largest difference between devices of a log-probability in float32, in nats: their sums have
other orders, and their exponentials other last digits."""

N_POSITIONS, PREFIX, PROMPT, NEW = 96, 16, 40, 12


def parity(place: Path, backend: BackendName, device: DeviceName) -> Outcome:
    """Log-probabilities of all tokens after a text, read whole and after a cached prefix."""
    there = get_backend(backend, device)
    largest = {}
    for name, folder in preset_models(place):
        ids, scorer = _random_ids(2, 33), there.scorer(folder)
        expected = log_probabilities(_reference(folder), ids, _places(ids))
        whole = log_probabilities(scorer, ids, _places(ids))
        prefix, rest = ids[:, :PREFIX], ids[:, PREFIX:]
        after = log_probabilities(scorer, rest, _places(rest), prefix)
        largest[name] = max(_largest(whole, expected), _largest(after, expected))
    return _worst(largest, TOLERANCE, "largest difference of a log-probability")


def decoding(place: Path, backend: BackendName, device: DeviceName) -> Outcome:
    """Greedy text with each cache, alone and in a batch of prompts of unequal lengths."""
    there = get_backend(backend, device)
    lost = {}
    for name, folder in preset_models(place):
        reference = _reference(folder)
        prompts = [list(map(int, _random_ids(1, n)[0])) for n in (PROMPT, 7, 19)]
        for kind in CACHES if folder.config.attention_spec.latent_widths else CACHES[1:]:
            decoder = _decoder(there, folder, kind)
            tokens: list[list[int]] = [[] for _ in prompts]
            for i, piece in decoder.batch(prompts, _greedy()):
                tokens[i] += piece.token_ids
            alone = _tokens(decoder, prompts[0], _greedy())
            texts = [*zip(prompts, tokens), (prompts[0], alone)]
            lost[f"{name}, {kind}"] = max(regret(reference, p, t) for p, t in texts)
    return _worst(lost, TOLERANCE, _REGRET)


def absorbed(place: Path) -> Outcome:
    """Several queries at once over a cache of latents: a prompt that follows a saved one, and the
    check of a draft model's guesses."""
    there, lost = get_backend("mlx"), {}
    draft = None
    for name, folder in preset_models(place):
        draft = draft or folder  # the first preset's model, whose guesses are mostly wrong
        if not folder.config.attention_spec.latent_widths:
            continue
        reference, decoder = _reference(folder), _decoder(there, folder)
        prompt, more = (list(map(int, ids)) for ids in (_random_ids(1, PROMPT)[0], [5, 80, 9]))
        file = place / f"{name}.safetensors"
        first = _tokens(decoder, prompt, _greedy(save_prompt_cache=file, max_tokens=4))
        then = _tokens(decoder, more, _greedy(prompt_cache=file))
        guessed = _tokens(decoder, prompt, _greedy(draft_model=str(draft)))
        own = _tokens(decoder, prompt, _greedy(draft_model=str(folder)))  # all guesses right
        lost[name] = max(
            regret(reference, [*prompt, *first, *more], then),
            *(regret(reference, prompt, tokens) for tokens in (first, guessed, own)),
        )
    return _worst(lost, TOLERANCE, _REGRET)


def quantised_cache(place: Path) -> Outcome:
    """Greedy text with the cache in 8 and 4 bits, whose tokens may be a little less likely."""
    there, lost = get_backend("mlx"), {8: 0.0, 4: 0.0}
    for _, folder in preset_models(place):
        reference, decoder = _reference(folder), _decoder(there, folder)
        prompt = list(map(int, _random_ids(1, PROMPT)[0]))
        for bits in lost:
            tokens = _tokens(decoder, prompt, _greedy(kv_bits=bits))
            lost[bits] = max(lost[bits], regret(reference, prompt, tokens))
    passed = lost[8] <= QUANTISED[8] and lost[4] <= QUANTISED[4]
    figures = (f"{bits} bits {lost[bits]:.2g} (at most {QUANTISED[bits]:g})" for bits in lost)
    return Outcome(passed, f"{_REGRET} {', '.join(figures)}")


def half_precision(place: Path, backend: BackendName, device: DeviceName) -> Outcome:
    """bfloat16 against float32 on the same device: logits, and greedy text."""
    there, largest, lost = get_backend(backend, device), {}, {}
    prompt = list(map(int, _random_ids(1, PROMPT)[0]))
    for name, folder in preset_models(place):
        ids = _random_ids(2, 33)
        exact, rounded = (
            log_probabilities(there.scorer(folder, dtype), ids, _places(ids))
            for dtype in _BOTH_DTYPES
        )
        largest[name] = _largest(exact, rounded)
        text = _tokens(there.decoder(folder, "latent", "bfloat16"), prompt, _greedy())
        lost[name] = regret(there.scorer(folder), prompt, text)
    logits = _worst(largest, BFLOAT16, "largest difference of a log-probability")
    return together({"logits": logits, "text": _worst(lost, BFLOAT16, _REGRET)})


def cache_choice(place: Path) -> Outcome:
    """Speed of both caches at the widths of mla-124m."""
    folder = _write(place / "model", _shallow("mla-124m", n_layer=4, n_positions=1024))
    there = get_backend("mlx")
    prompt = list(map(int, _random_ids(1, 900)[0]))
    rates = {}
    for kind in CACHES:
        decoder = _decoder(there, folder, kind)
        _tokens(decoder, prompt, _greedy())
        *_, last = decoder.stream(prompt, _greedy(max_tokens=64))
        rates[kind] = last.figures["generation_tps"]
    found = ", ".join(f"{kind} {rates[kind]:,.0f} tokens/s" for kind in CACHES)
    return Outcome(True, found)


CACHES: tuple[CacheName, ...] = ("latent", "materialized")
_REGRET = "worst token below the likeliest, nats:"
_BOTH_DTYPES: tuple[DType, ...] = ("float32", "bfloat16")
QUANTISED = {8: 0.2, 4: 2.0}
BFLOAT16 = 0.25


def preset_models(place: Path) -> Iterator[tuple[str, ModelFolder]]:
    """(preset, model folder) of each, with its widths."""
    for name in PRESETS:
        yield name, _write(place / name, _shallow(name))


def small_model(folder: Path, name: str = "nano") -> ModelFolder:
    """Write such a model of one preset."""
    return _write(folder, _shallow(name))


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
    assert tokens
    ids = np.array([[*prompt, *tokens[:-1]]], np.int32)
    at, chosen = np.arange(len(prompt) - 1, ids.size, dtype=np.int32), np.array(tokens, np.int32)
    logprobs, greedy = scorer.run(None, [RowBatch(ids, np.zeros(1, np.int32), at, chosen)])
    lost = [
        float(log_probabilities(scorer, ids, at[[i]]).max()) - float(logprobs[i])
        for i in np.flatnonzero(~greedy | np.isnan(logprobs))
    ]
    return max(lost, default=0.0)


def _reference(folder: ModelFolder) -> Scorer:
    return get_backend("mlx", "cpu").scorer(folder)


def _decoder(backend: Backend, folder: ModelFolder, cache: CacheName = "latent") -> Decoder:
    """In float32, in which texts are claimed to be equal."""
    return backend.decoder(folder, cache, "float32")


def _greedy(**options: object) -> GenerationOptions:
    return dataclasses.replace(GenerationOptions(temp=0, max_tokens=NEW), **options)  # type: ignore[arg-type]


def _tokens(decoder: Decoder, prompt: Sequence[int], options: GenerationOptions) -> list[int]:
    return [t for piece in decoder.stream(prompt, options) for t in piece.token_ids]


def _random_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, (batch, length)).astype(np.int32)


def _places(ids: np.ndarray) -> np.ndarray:
    """Four of the last places of each row, in the flattened ids."""
    B, L = ids.shape
    return np.add.outer(np.arange(B) * L, L - 1 - np.arange(0, 16, 4)).ravel()


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def _worst(values: dict[str, float], bound: float, what: str) -> Outcome:
    """The largest of the figures of several models; NaN is the largest."""
    worst = max(values, key=lambda name: (np.isnan(values[name]), values[name]))
    found = at_most(values[worst], bound, what)
    return dataclasses.replace(found, figure=f"{found.figure}, {worst}")


def _shallow(name: str, **changes: int) -> ModelConfig:
    """A preset's model of few layers, positions and tokens."""
    sizes = {"n_layer": 2, "n_positions": N_POSITIONS, "vocab_size": ByteTokenizer.size}
    model = preset(name).model
    # A narrow MLP: it is no other than a linear layer.
    sizes["n_inner"] = model.n_embd
    return dataclasses.replace(model, **{**sizes, **changes}).resolved()  # type: ignore[arg-type]


def _write(folder: Path, config: ModelConfig) -> ModelFolder:
    """A model folder of random weights that make attention and the next token neither even nor
    certain."""
    rng = np.random.default_rng(0)
    weights = initial_weights(config, seed=0, std=1.5 * config.n_embd**-0.5)
    for name, w in weights.items():
        if w.ndim == 1:
            weights[name] = w + 0.1 * rng.standard_normal(w.shape, dtype=np.float32)
    with atomic_folder(folder) as target:
        checkpoint.write_model(target, config, weights, ByteTokenizer().fast_tokenizer(), "")
    return ModelFolder(folder)
