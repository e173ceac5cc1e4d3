"""What needs a trained model: the perplexity that quantised caches and weights cost, and the speed
of a draft model.

    python -m bench.decode_trained --models RUN [RUN ...] [--draft RUN] [--out bench/results]

The models are run or model folders with one tokenizer, for example those of
`bench/convert_mla.py`'s recipe. Text is the end of --text, which they have not seen. A window is
read through the cache in two parts, so that the second is scored on what the quantised cache holds,
as decoding does; only it counts. Losses are compared window by window with those of the model as it
is, so each difference has a standard error.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from bench.harness import Document, Report, Row, document, publish
from mlx_mla import checkpoint, cli
from mlx_mla.backends.mlx.caches import QuantizedKVCache
from mlx_mla.backends.mlx.decode import MLXDecoder
from mlx_mla.backends.mlx.load import load
from mlx_mla.data import corpus
from mlx_mla.decoding.request import GenerationOptions
from mlx_mla.errors import UserError

PROG = "python -m bench.decode_trained"


@dataclasses.dataclass(kw_only=True)
class TrainedBench:
    """Measure what quantisation costs trained models, and what a draft model gains."""

    models: tuple[Path, ...]
    """Run or model folders."""
    text: Path
    """UTF-8 text; its last part is held out."""
    held_out: float = 0.1
    """Share of the text that the models have not seen."""
    windows: int = 128
    """Windows to score, spread evenly over the held-out text."""
    draft: Optional[Path] = None
    """A small model to guess for the others."""
    tokens: int = 200
    """Tokens to generate with and without the draft model, after each of 8 prompts."""
    out: Optional[Path] = None
    """Folder for the report. None: only print."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    s = cli.parse(TrainedBench, argv, PROG)
    if not s.models or not 0 < s.held_out < 1 or s.windows < 2 or s.tokens < 1:
        raise UserError(
            "--models must not be empty, --held-out between 0 and 1, --windows 2 or more, "
            "--tokens positive"
        )
    folders = {p.name: checkpoint.model_folder(p) for p in s.models}
    quality = [row for name, folder in folders.items() for row in quantised(s, name, folder)]
    speed = (
        [row for name, folder in folders.items() for row in drafted(s, name, folder)]
        if s.draft
        else []
    )
    measured = {"quality": quality, "speed": speed}
    packages = ("mlx", "mlx-lm")
    found = document("bench.decode_trained", PROG, argv, s, {"mlx": "auto"}, packages, **measured)
    publish(REPORT, found, s.out)
    return 0


def held_out(s: TrainedBench, folder: Path) -> np.ndarray:
    """Token ids that the models have not seen."""
    text = corpus.read_documents(str(s.text))[0]
    return np.array(
        checkpoint.read_tokenizer(folder).encode(text[int(len(text) * (1 - s.held_out)) :])
    )


def quantised(s: TrainedBench, name: str, folder: Path) -> list[Row]:
    """Perplexity by bits of the cache and of the weights."""
    tokens, length = held_out(s, folder), checkpoint.read_config(folder).n_positions
    starts = np.linspace(0, len(tokens) - length - 1, s.windows).astype(int)
    x = mx.array(np.stack([tokens[a : a + length + 1] for a in starts]))
    rows, base = [], None
    for weight_bits in (None, 8, 4):
        model = load(folder)
        if weight_bits:
            nn.quantize(
                model, 64, weight_bits, class_predicate=lambda path, m: _quantisable(path, m)
            )
        for cache_bits in (None, 8, 4) if weight_bits in (None, 4) else (None,):
            losses = window_losses(model, x, cache_bits)
            if losses is None:
                continue
            base = losses if base is None else base
            change = losses - base
            rows.append(
                {
                    "model": name,
                    "weight_bits": weight_bits,
                    "cache_bits": cache_bits,
                    "loss": float(losses.mean()),
                    "perplexity": math.exp(losses.mean()),
                    "change": math.expm1(change.mean()),
                    "error": float(change.std(ddof=1)) / math.sqrt(len(change)),
                    "bytes": cache_bytes(model, cache_bits),
                }
            )
            print(rows[-1], flush=True)
    return rows


def _quantisable(path: str, module: nn.Module) -> bool:
    return (
        hasattr(module, "to_quantized")
        and not path.endswith("wpe")
        and module.weight.shape[-1] % 64 == 0
    )


def new_cache(model: Any, bits: int | None) -> list[Any] | None:
    if bits is None:
        return make_prompt_cache(model)
    like = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=like)
    widths = {w for c in like for w in (c.keys.shape[-1], c.values.shape[-1]) if w}
    size = next((g for g in (64, 32) if all(w % g == 0 for w in widths)), None)
    return None if size is None else [QuantizedKVCache(size, bits) for _ in like]


def window_losses(model: Any, x: mx.array, bits: int | None) -> np.ndarray | None:
    """Mean loss of the second half of every window (nats a token); None if the width has no group
    size."""
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
    """Of a layer, for one token of context, with bfloat16 for what is not quantised."""
    like, cache = make_prompt_cache(model), new_cache(model, bits)
    assert cache is not None
    model(mx.zeros((1, 1), mx.int32), cache=like)
    for c, shape in zip(cache, like):
        c.update_and_fetch(
            *(
                mx.zeros((*a.shape[:2], 1, a.shape[3]), mx.bfloat16)
                for a in (shape.keys, shape.values)
            )
        )
    return sum(c.nbytes for c in cache) / len(cache) / cache[0].step


def drafted(s: TrainedBench, name: str, folder: Path) -> list[Row]:
    """Tokens per second and accepted guesses, greedy, by number of guessed tokens."""
    decoder, tokens = MLXDecoder(mx.default_device(), folder), held_out(s, folder)
    room = decoder.n_positions - s.tokens
    prompts = [
        tokens[a : a + room // 2].tolist()
        for a in np.linspace(0, len(tokens) - room, 8).astype(int)
    ]
    rows: list[Row] = []
    alone: list[list[int]] = []
    for guesses in (0, 2, 3, 4, 6):
        options = GenerationOptions(temp=0, max_tokens=s.tokens)
        if guesses:
            options = dataclasses.replace(
                options, draft_model=str(s.draft), num_draft_tokens=guesses
            )
        texts, accepted, seconds = [], 0, []
        for prompt in [prompts[0], *prompts]:  # the first one warms up
            began = time.perf_counter()
            pieces = list(decoder.stream(prompt, options))
            seconds.append(time.perf_counter() - began)
            texts.append([t for p in pieces for t in p.token_ids])
            accepted += pieces[-1].figures.get("accepted_draft_tokens", 0)
        alone = alone or texts
        count = sum(map(len, texts[1:]))
        rows.append({
            "model": name, "guesses": guesses, "tokens_per_sec": count / sum(seconds[1:]),
            "accepted": accepted / sum(map(len, texts)), "same_text": texts == alone,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def body(found: Document, pictures: Mapping[str, str]) -> list[str]:
    """The tables."""
    quality: list[Row] = found["quality"]
    speed: list[Row] = found["speed"]
    s = found["settings"]
    lines = [
        f"- {s['windows']} windows of held-out text, the second half of each scored; float32 where "
        "not quantised",
        "",
    ]
    lines += [
        "| model | weights | cache | bytes a token and layer | perplexity | change |",
        "|---|---|---|---|---|---|",
    ]
    for r in quality:
        weights, cache = (
            f"{b} bits" if b else "as trained" for b in (r["weight_bits"], r["cache_bits"])
        )
        lines.append(
            f"| {r['model']} | {weights} | {cache} | {r['bytes']:,.0f} | {r['perplexity']:.4f} | "
            f"{r['change']:+.2%} ± {r['error']:.2%} |"
        )
    if speed:
        lines += [
            "",
            f"Greedy text of {s['tokens']} tokens after 8 prompts, with `--draft-model` "
            f"{Path(s['draft']).name}.",
            "",
        ]
        lines += [
            "| model | guessed at a time | tok/s | against none | guessed tokens in the text | "
            "same text |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        base: dict[str, float] = {}
        for r in speed:
            base.setdefault(r["model"], r["tokens_per_sec"])
            lines.append(
                f"| {r['model']} | {r['guesses'] or 'none'} | {r['tokens_per_sec']:.0f} | "
                f"{r['tokens_per_sec'] / base[r['model']]:.2f}x | {r['accepted']:.0%} | "
                f"{'yes' if r['same_text'] else 'NO'} |"
            )
    return lines


REPORT = Report("decode-trained", "Quantised caches and weights, and a draft model", body)


if __name__ == "__main__":
    sys.exit(main())
