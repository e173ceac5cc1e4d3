"""The options of a request for text, and whether a model can fulfil it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from mlx_mla.errors import UserError
from mlx_mla.fields import PositiveInt, at_least_1, between, check_bounds
from mlx_mla.model.config import ModelConfig, Seed

CacheName = Literal["latent", "materialized", "none"]
CacheChoice = Literal["latent", "materialized", "none", "auto"]
"""The values of --cache. "auto" means "latent"; it once chose by a cost model, but latents cost at
most 4 % and mostly nothing (docs/measured.md)."""

DEFAULT_MAX_TOKENS = 200

LARGEST_INT = 2**31 - 1

OVERFLOWS = (
    "the model's scores are not finite for this text: its weights are damaged, or too large for "
    "the type of the computation"
)
"""The message if a model gives no finite probabilities."""

GREEDY_BELOW = 1e-30
"""Temperature below which float32 logits overflow. Below it, decoding is greedy."""


@dataclasses.dataclass(kw_only=True)
class GenerationOptions:
    """How to continue a prompt."""

    max_tokens: Optional[PositiveInt] = None
    """Maximum number of tokens to generate per prompt. None: 200, or as many as fit in
    n_positions."""
    temp: Annotated[float, between(0, 100, "0 is greedy")] = 0.8
    """Sampling temperature, up to 100. 0: greedy, always the most likely token."""
    top_k: int = 0
    """Sample from this many of the most likely tokens. 0: off."""
    # Below 1e-6, float32 has no share of the probability that small.
    top_p: Annotated[float, between(1e-6, 1, "1 is off")] = 1.0
    """Sample from the most likely tokens whose probabilities add up to this. 1: off."""
    min_p: Annotated[float, between(0, 1, "0 is off")] = 0.0
    """Sample from the tokens with at least this fraction of the most likely token's probability.
    0: off."""
    repetition_penalty: Annotated[float, between(0.01, 100, "1 is off")] = 1.0
    """Divide the scores of recent tokens by this. 1: off."""
    repetition_context_size: Annotated[int, at_least_1(LARGEST_INT)] = 64
    """Tokens that count as recent for --repetition-penalty."""
    seed: Seed = 0
    """Seed of the sampling. A text depends on the seed, its prompt and the options, but not on the
    other prompts of a batch."""
    stop: tuple[str, ...] = ()
    """Strings that end the text. They are not printed."""
    cache: CacheChoice = "latent"
    """What to keep between tokens: the latents (also "auto"), expanded keys and values, or nothing.
    "none" recomputes the whole context for every token."""
    kv_bits: Optional[Literal[4, 8]] = None
    """Quantize the cache to this many bits. None: off."""
    prompt_cache: Optional[Path] = None
    """Continue from the context in this .safetensors file, which --save-prompt-cache wrote. The
    prompt is appended to it."""
    save_prompt_cache: Optional[Path] = None
    """Write the context, including the generated text, to this .safetensors file."""
    draft_model: Optional[str] = None
    """Speculative decoding: a small model with the same tokenizer proposes tokens, and the model
    checks several at once. A run folder, model folder or hub id. In float32, greedy text stays the
    same."""
    num_draft_tokens: Annotated[int, at_least_1(LARGEST_INT)] = 3
    """Tokens that --draft-model proposes at a time."""
    max_kv_size: Optional[int] = None
    """Maximum tokens of context, at most n_positions. At that length, the older half is dropped and
    the newer half is read again. None: a context past n_positions is an error."""


def cache_of(config: ModelConfig, cache: CacheChoice) -> CacheName:
    """The cache that a model uses for a value of --cache.

    Multi-head attention has no latents. Latents without an up-projection are keys and values
    already.
    """
    if cache == "none":
        return cache
    if config.attention_k_eq_v or (config.attention_spec.latent_widths and cache != "materialized"):
        return "latent"
    return "materialized"


def check_request(
    prompt: Sequence[int], options: GenerationOptions, vocab_size: int, n_positions: int
) -> int:
    """Check a request against a model. Returns the number of tokens to generate.

    Raises:
        UserError: If the model cannot fulfil it; the message names the option and a remedy.
    """
    check_prompt(prompt, vocab_size)
    check_bounds(options)
    if not 0 <= options.top_k < vocab_size:
        raise UserError(f"--top-k must be from 0 (off) to {vocab_size - 1}, not {options.top_k}")
    if "" in options.stop:
        raise UserError("--stop takes strings that are not empty")
    if options.max_kv_size is not None:
        if not 2 <= options.max_kv_size <= n_positions:
            raise UserError(
                f"--max-kv-size must be from 2 to n_positions ({n_positions}), not "
                f"{options.max_kv_size}"
            )
        return DEFAULT_MAX_TOKENS if options.max_tokens is None else options.max_tokens
    way_out = f", or give --max-kv-size {n_positions}"
    room = check_room(len(prompt), options.max_tokens, n_positions, "--max-tokens", way_out)
    return min(DEFAULT_MAX_TOKENS, room) if options.max_tokens is None else options.max_tokens


def check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    """Refuse an empty prompt, or token ids that the model does not have; raises UserError."""
    if len(prompt) == 0:
        raise UserError("the prompt has no tokens; give some text")
    if max(prompt) >= vocab_size or min(prompt) < 0:
        bad = next(t for t in prompt if not 0 <= t < vocab_size)
        raise UserError(
            f"the prompt has token id {bad}, outside the model's vocabulary of {vocab_size}; the "
            "tokenizer in the folder does not belong to this model"
        )


def check_room(
    prompt_tokens: int, asked: Optional[int], n_positions: int, option: str, way_out: str = ""
) -> int:
    """How many tokens the model can generate after a prompt.

    Args:
        asked: Tokens that the request asks for, if it says so.
        option: Name of that option, for messages.
        way_out: Further advice, to end the message with.

    Raises:
        UserError: If there is no room, or less than the request asks for.
    """
    room = n_positions - prompt_tokens
    if room < (asked or 1):
        wanted = "" if asked is None else f" and {option} {asked}"
        remedy = f"use {option} {room}" if room > 0 else f"shorten the prompt to {n_positions - 1}"
        raise UserError(
            f"{prompt_tokens} prompt tokens{wanted} exceed the model's n_positions={n_positions}; "
            f"{remedy}{way_out}"
        )
    return room


def check_draft(name: str, tokenizer: Any, draft_tokenizer: Any) -> None:
    """Raise a UserError if a draft model has other tokens."""
    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise UserError(
            f"--draft-model {name}: has another vocabulary ({len(draft_tokenizer)} tokens, the "
            f"model {len(tokenizer)}); a draft model must have the model's own tokenizer"
        )


def fit_context(context: list[int], limit: int) -> list[int]:
    """The context to continue with: all of it, or its newer half once it is full.

    Positions are absolute, so a full context cannot slide. Its newer half is read again.
    """
    return context if len(context) < limit else context[-max(1, limit // 2) :]


def is_greedy(options: GenerationOptions) -> bool:
    """True if the most likely token is always taken."""
    return options.temp < GREEDY_BELOW
