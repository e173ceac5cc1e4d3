"""What a request for text may ask, and whether a model can do it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

from mlx_mla.errors import UserError
from mlx_mla.model.config import MAX_SEED, ModelConfig, flag

CacheName = Literal["latent", "materialized", "none"]
CacheChoice = Literal["latent", "materialized", "none", "auto"]
"""What --cache takes. "auto" once chose by a cost model; it means "latent", which costs at most 4 %
and mostly nothing (docs/measured.md)."""

DEFAULT_MAX_TOKENS = 200

LARGEST_INT = 2**31 - 1
BOUNDS: dict[str, tuple[float, float, str]] = {
    "temp": (0, 100, "0 is greedy"),
    # Below, float32 has no share of the probability that small.
    "top_p": (1e-6, 1, "1 is off; --temp 0 takes the likeliest token"),
    "min_p": (0, 1, "0 is off"),
    "repetition_penalty": (0.01, 100, "1 is off"),
    "repetition_context_size": (1, LARGEST_INT, "64 is usual"),
    "num_draft_tokens": (1, LARGEST_INT, "3 is usual"),
    "seed": (0, MAX_SEED, "any such number will do"),
}
"""Lowest and highest value of each number of a request, and a word of advice. NaN is none."""

OVERFLOWS = (
    "the model's scores are not finite for this text: its weights are damaged, or too large for "
    "the type of the computation"
)
"""What is said where finite weights give no probabilities."""

GREEDY_BELOW = 1e-30
"""Temperature below which logits in float32 overflow; what is left is the likeliest token."""


@dataclasses.dataclass(kw_only=True)
class GenerationOptions:
    """How to continue a prompt."""

    max_tokens: Optional[int] = None
    """Most tokens to generate for each prompt. None: 200, or as many as fit in n_positions."""
    temp: float = 0.8
    """Sampling temperature, up to 100. 0: greedy, always the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens. 0: off."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability. 1: off."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the likeliest one's probability. 0: off."""
    repetition_penalty: float = 1.0
    """Divide the scores of recent tokens by this. 1: off."""
    repetition_context_size: int = 64
    """Tokens that count as recent for --repetition-penalty."""
    seed: int = 0
    """Seed of the sampling. The text depends on it, the prompt and the options, and not on the
    prompts of the same batch."""
    stop: tuple[str, ...] = ()
    """Texts at which to stop; they are not printed."""
    cache: CacheChoice = "latent"
    """What to keep between tokens: the latents (also "auto"), expanded keys and values, or nothing,
    which recomputes the whole context for every token."""
    kv_bits: Optional[Literal[4, 8]] = None
    """Quantise the cache to so many bits. None: off."""
    prompt_cache: Optional[Path] = None
    """Continue from the context in this .safetensors file of --save-prompt-cache; the prompt is the
    text that follows it."""
    save_prompt_cache: Optional[Path] = None
    """Write the context, with what was generated, to this .safetensors file."""
    draft_model: Optional[str] = None
    """A small model with the same tokenizer that guesses tokens for the model to check, several at
    a time: run folder, model folder or hub id. The greedy text stays the same in float32."""
    num_draft_tokens: int = 3
    """Tokens that --draft-model guesses at a time."""
    max_kv_size: Optional[int] = None
    """Continue past this many tokens of context (at most n_positions) by dropping all but the
    newest half and reading it again. None: a context past n_positions is an error."""


def cache_of(config: ModelConfig, cache: CacheChoice) -> CacheName:
    """The cache that a model uses for a value of --cache: multi-head attention has no latents, and
    those without an up-projection are keys and values already."""
    if cache == "none":
        return cache
    if config.attention_k_eq_v or (config.kind.latent_widths and cache != "materialized"):
        return "latent"
    return "materialized"


def check_request(
    prompt: Sequence[int], options: GenerationOptions, vocab_size: int, n_positions: int
) -> int:
    """Refuse what a model cannot do; returns how many tokens to generate.

    Raises:
        UserError: Naming the option and its remedy.
    """
    if len(prompt) == 0:
        raise UserError("the prompt has no tokens; give some text")
    if max(prompt) >= vocab_size or min(prompt) < 0:
        bad = next(t for t in prompt if not 0 <= t < vocab_size)
        raise UserError(
            f"the prompt has token id {bad}, outside the model's vocabulary of {vocab_size}; the "
            "tokenizer in the folder does not belong to this model"
        )
    _check_sampling(options, vocab_size)
    if options.max_kv_size is not None:
        if not 2 <= options.max_kv_size <= n_positions:
            raise UserError(
                f"--max-kv-size must be from 2 to n_positions ({n_positions}), not "
                f"{options.max_kv_size}"
            )
        return DEFAULT_MAX_TOKENS if options.max_tokens is None else options.max_tokens
    room = n_positions - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model n_positions={n_positions}; shorten "
            f"it to {n_positions - 1}, or give --max-kv-size {n_positions}"
        )
    if options.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if options.max_tokens > room:
        raise UserError(
            f"{len(prompt)} prompt tokens and --max-tokens {options.max_tokens} exceed the model's "
            f"n_positions={n_positions}; use --max-tokens {room}, or give --max-kv-size "
            f"{n_positions}"
        )
    return options.max_tokens


def check_draft(name: str, tokenizer: Any, draft_tokenizer: Any) -> None:
    """Refuse a draft model whose token ids mean something else; raises UserError."""
    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise UserError(
            f"--draft-model {name}: has another vocabulary ({len(draft_tokenizer)} tokens, the "
            f"model {len(tokenizer)}); a draft model must have the model's own tokenizer"
        )


def fit_context(context: list[int], limit: int) -> list[int]:
    """The context to continue with: all of it, or its newest half once it is full.

    Positions are absolute, so a full context cannot slide. Its newest half is read again.
    """
    return context if len(context) < limit else context[-max(1, limit // 2) :]


def is_greedy(options: GenerationOptions) -> bool:
    """Whether the likeliest token is always taken."""
    return options.temp < GREEDY_BELOW


def outside(name: str, value: float) -> str | None:
    """What is wrong with a number of BOUNDS, in words; None where nothing is."""
    low, high, advice = BOUNDS[name]
    if low <= value <= high:  # not so for NaN
        return None
    return f"must be from {low:.10g} to {high:.10g}, not {value}; {advice}"


def _check_sampling(options: GenerationOptions, vocab_size: int) -> None:
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {options.max_tokens}")
    for name in BOUNDS:
        if problem := outside(name, getattr(options, name)):
            raise UserError(f"{flag(name)} {problem}")
    if not 0 <= options.top_k < vocab_size:
        raise UserError(f"--top-k must be from 0 (off) to {vocab_size - 1}, not {options.top_k}")
    if "" in options.stop:
        raise UserError("--stop takes strings that are not empty")
