"""What needs trained models: the perplexity that quantized caches and weights cost, and the speed
of a draft model.

    python -m bench trained --models RUN [RUN ...] --text TEXT [--draft RUN] [--out DIR]

The models are run or model folders with one tokenizer, for example an MHA model and its
conversions. Text is the end of --text, which they have not seen. A window is read through the cache
in two parts, so that the second is scored on what the quantized cache holds, as in decoding; only
it counts. Losses are compared window by window with those of the unquantized model, so each
difference has a standard error.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

from bench.harness import Benchmark, Document, Results, Row
from bench.rows import Figure, Positive, Signed, Whole, rows
from mlx_mla import checkpoint
from mlx_mla.backends.mlx.caches import QuantizedKVCache
from mlx_mla.backends.mlx.decode import GROUP_SIZES, MLXDecoder
from mlx_mla.backends.mlx.load import load
from mlx_mla.checkpoint import ModelFolder
from mlx_mla.data import corpus
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.display import markdown_table
from mlx_mla.errors import UserError
from mlx_mla.fields import Bounds, PositiveInt, positive

BITS = (None, 8, 4)
GUESSES = (0, 2, 3, 4, 6)


QUALITY = rows({
    "model": str, "weight_bits": Optional[Whole], "cache_bits": Optional[Whole], "loss": Figure,
    "perplexity": Figure, "change": Signed, "error": Figure, "bytes": Figure,
})  # fmt: skip
"""Perplexity, its change against the unquantized model with a standard error, and the bytes of a
token in one layer's cache. Bits of None: as trained."""
SPEED = rows({
    "model": str, "guesses": Whole, "tokens_per_sec": Positive, "accepted": Figure,
    "same_text": bool,
})  # fmt: skip
"""Greedy generation by guessed tokens at a time, and the share of the text that was guessed."""


@dataclasses.dataclass(kw_only=True)
class Trained(Benchmark):
    """Measure what quantization costs trained models, and what a draft model gains."""

    models: tuple[Path, ...]
    """Run or model folders."""
    text: Path
    """UTF-8 text; its last part is held out."""
    held_out: Annotated[float, positive(0.99)] = 0.1
    """Share of the text that the models have not seen."""
    windows: Annotated[int, Bounds("be at least 2", 2, 10**6)] = 128
    """Windows to score, spread evenly over the held-out text."""
    draft: Optional[Path] = None
    """A small model to guess for the others."""
    tokens: PositiveInt = 200
    """Tokens to generate with and without the draft model, after each of 8 prompts."""

    name = "trained"
    title = "Quantized caches and weights, and a draft model"
    stored: ClassVar = {"quality": QUALITY, "speed": SPEED}
    packages = ("mlx", "mlx-lm")
    devices: ClassVar = {"mlx": "auto"}

    def measure(self, results: Results) -> None:
        text = corpus.read_documents(str(self.text))[0]
        unseen = text[int(len(text) * (1 - self.held_out)) :]
        subjects = []
        for path in self.models:
            folder = ModelFolder(checkpoint.model_folder(path))
            tokens, context = np.array(folder.tokenizer.encode(unseen)), folder.config.n_positions
            if len(tokens) <= context:
                raise UserError(
                    f"--text {self.text}: its held-out part has {len(tokens)} tokens, and a window "
                    f"of {path} has {context + 1}; give a longer text"
                )
            if self.draft and self.tokens > context - 2:
                raise UserError(
                    f"--tokens {self.tokens}: {path} has {context} positions, of which two at "
                    "least are for a prompt"
                )
            subjects.append((path, folder, tokens))
        for path, folder, tokens in subjects:
            parts = {"quality": quantized(self, path.name, folder, tokens)}
            if self.draft:
                parts["speed"] = drafted(self, path.name, folder, tokens)
            for part, found in parts.items():
                for row in found:
                    print(row, flush=True)
                    results.add(row, to=part)

    @staticmethod
    def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
        s, bits = found["settings"], {None: "as trained", 8: "8 bits", 4: "4 bits"}
        header = ("model", "weights", "cache", "bytes a token and layer", "perplexity", "change")
        cells = [
            (
                r["model"], bits.get(r["weight_bits"]), bits.get(r["cache_bits"]),
                f"{r['bytes']:,.0f}", f"{r['perplexity']:.4f}",
                f"{r['change']:+.2%} ± {r['error']:.2%}",
            )
            for r in found["quality"]
        ]  # fmt: skip
        lines = [
            f"- {s['windows']} windows of held-out text, the second half of each scored; float32 "
            "where not quantized",
            "",
            *markdown_table(header, cells),
        ]
        if not found["speed"]:
            return lines
        header = ("model", "guessed at a time", "tok/s", "against none",
                  "guessed tokens in the text", "same text")  # fmt: skip
        base = {r["model"]: r["tokens_per_sec"] for r in reversed(found["speed"])}
        cells = [
            (
                r["model"], r["guesses"] or "none", f"{r['tokens_per_sec']:.0f}",
                f"{r['tokens_per_sec'] / base[r['model']]:.2f}x", f"{r['accepted']:.0%}",
                "yes" if r["same_text"] else "NO",
            )
            for r in found["speed"]
        ]  # fmt: skip
        text = f"Greedy text of {s['tokens']} tokens after 8 prompts, with and without"
        return [*lines, "", f"{text} `--draft-model`.", "", *markdown_table(header, cells)]


def quantized(s: Trained, name: str, folder: ModelFolder, tokens: np.ndarray) -> Iterator[Row]:
    """Perplexity by bits of the cache and of the weights."""
    length, base = folder.config.n_positions, None
    starts = np.linspace(0, len(tokens) - length - 1, s.windows).astype(int)
    x = mx.array(np.stack([tokens[a : a + length + 1] for a in starts]))
    for weight_bits in BITS:
        model = load(folder)
        if weight_bits:
            quantize_model(model, {}, 64, weight_bits)
        for cache_bits in (None,) if weight_bits == 8 else BITS:
            losses = window_losses(model, x, cache_bits)
            if losses is None:
                continue
            base = losses if base is None else base
            change = losses - base
            yield {
                "model": name, "weight_bits": weight_bits, "cache_bits": cache_bits,
                "loss": float(losses.mean()), "perplexity": math.exp(losses.mean()),
                "change": math.expm1(change.mean()), "bytes": cache_bytes(model, cache_bits),
                # The delta method's, since the change is a ratio.
                "error": math.exp(change.mean()) * change.std(ddof=1) / math.sqrt(len(change)),
            }  # fmt: skip


def new_cache(model: Any, bits: int | None) -> list[Any] | None:
    """A cache of so many bits; None if the width has no group size."""
    if bits is None:
        return make_prompt_cache(model)
    one = _one_token(model)
    widths = {w for c in one for w in (c.keys.shape[-1], c.values.shape[-1]) if w}
    size = next((g for g in GROUP_SIZES if all(w % g == 0 for w in widths)), None)
    return None if size is None else [QuantizedKVCache(size, bits) for _ in one]


def _one_token(model: Any) -> list[Any]:
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=cache)
    return cache


def window_losses(model: Any, x: mx.array, bits: int | None) -> np.ndarray | None:
    """Mean loss of the second half of every window (nats per token); None if the width has no
    group size."""
    half, losses = x.shape[1] // 2, []
    for at in range(0, len(x), 16):
        cache, ids = new_cache(model, bits), x[at : at + 16]
        if cache is None:
            return None
        model(ids[:, :half], cache=cache)
        logits = model(ids[:, half:-1], cache=cache)
        loss = nn.losses.cross_entropy(logits, ids[:, half + 1 :], reduction="none").mean(axis=1)
        losses.append(np.array(loss, np.float64))
    return np.concatenate(losses)


def cache_bytes(model: Any, bits: int | None) -> float:
    """Of a layer, for one token of context, with bfloat16 for what is not quantized."""
    cache = new_cache(model, bits)
    assert cache is not None
    for c, like in zip(cache, _one_token(model)):
        arrays = (like.keys, like.values)
        c.update_and_fetch(*(mx.zeros((*a.shape[:2], 1, a.shape[3]), mx.bfloat16) for a in arrays))
    return float(sum(c.nbytes for c in cache) / len(cache) / cache[0].step)


def drafted(s: Trained, name: str, folder: ModelFolder, tokens: np.ndarray) -> Iterator[Row]:
    """Tokens per second and accepted guesses, greedy, by number of guessed tokens."""
    decoder = MLXDecoder(mx.default_device(), folder)
    room = decoder.n_positions - s.tokens
    starts = np.linspace(0, len(tokens) - room, 8).astype(int)
    prompts = [tokens[a : a + room // 2].tolist() for a in starts]
    alone = None
    for guesses in GUESSES:
        drafts = {"draft_model": str(s.draft), "num_draft_tokens": guesses} if guesses else {}
        options = GenerationOptions(temp=0, max_tokens=s.tokens, **drafts)  # type: ignore[arg-type]
        texts, accepted, took = [], 0, []
        for prompt in [prompts[0], *prompts]:  # the first one warms up
            began = time.perf_counter()
            pieces = list(decoder.stream(prompt, options))
            took.append(time.perf_counter() - began)
            texts.append([t for p in pieces for t in p.token_ids])
            accepted += pieces[-1].figures.get("accepted_draft_tokens", 0)
        alone = alone or texts
        yield {
            "model": name, "guesses": guesses, "same_text": texts == alone,
            "tokens_per_sec": sum(map(len, texts[1:])) / sum(took[1:]),
            "accepted": accepted / sum(map(len, texts)),
        }  # fmt: skip
