"""What decoding shares between backends: checks, text from tokens, figures."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from mlx_mla.backend import GenerationOptions
from mlx_mla.errors import UserError

DEFAULT_MAX_TOKENS = 200


def check_request(prompt: Sequence[int], options: GenerationOptions, vocab_size: int, n_positions: int) -> int:
    """Refuse what a model cannot do; returns how many tokens to generate.

    Raises:
        UserError: Naming the option and its remedy.
    """
    if len(prompt) == 0:
        raise UserError("the prompt has no tokens; give some text")
    if max(prompt) >= vocab_size or min(prompt) < 0:
        bad = next(t for t in prompt if not 0 <= t < vocab_size)
        raise UserError(
            f"the prompt has token id {bad}, outside the model's vocabulary of {vocab_size}; "
            "the tokenizer in the folder does not belong to this model"
        )
    _check_sampling(options, vocab_size)
    if options.num_draft_tokens < 1:
        raise UserError(f"--num-draft-tokens must be at least 1, not {options.num_draft_tokens}")
    if options.max_kv_size is not None:
        if not 2 <= options.max_kv_size <= n_positions:
            raise UserError(f"--max-kv-size must be from 2 to n_positions ({n_positions}), not {options.max_kv_size}")
        return DEFAULT_MAX_TOKENS if options.max_tokens is None else options.max_tokens
    room = n_positions - len(prompt)
    if room < 1:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model n_positions={n_positions}; "
            f"shorten it to {n_positions - 1}, or give --max-kv-size {n_positions}"
        )
    if options.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, room)
    if options.max_tokens > room:
        raise UserError(
            f"{len(prompt)} prompt tokens and --max-tokens {options.max_tokens} exceed the model's "
            f"n_positions={n_positions}; use --max-tokens {room}, or give --max-kv-size {n_positions}"
        )
    return options.max_tokens


def check_draft(name: str, tokenizer: Any, draft_tokenizer: Any) -> None:
    """Refuse a draft model whose token ids mean something else; raises UserError."""
    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise UserError(
            f"--draft-model {name}: has another vocabulary ({len(draft_tokenizer)} tokens, the model "
            f"{len(tokenizer)}); a draft model must have the model's own tokenizer"
        )


def fit_context(context: list[int], limit: int) -> list[int]:
    """The context to go on with: itself, or once it is full its newest half.

    Positions are absolute, so a full context cannot slide; its newest half is read again.
    """
    return context if len(context) < limit else context[-max(1, limit // 2) :]


def _check_sampling(options: GenerationOptions, vocab_size: int) -> None:
    if options.max_tokens is not None and options.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {options.max_tokens}")
    if options.temp < 0:
        raise UserError(f"--temp must not be negative, not {options.temp}; 0 is greedy")
    if not 0 <= options.top_k < vocab_size:
        raise UserError(f"--top-k must be from 0 (off) to {vocab_size - 1}, not {options.top_k}")
    for name, value in (("--top-p", options.top_p), ("--min-p", options.min_p)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be between 0 and 1, not {value}")
    if options.repetition_penalty <= 0:
        raise UserError(f"--repetition-penalty must be positive, not {options.repetition_penalty}; 1 is off")
    if options.repetition_context_size < 1:
        raise UserError(f"--repetition-context-size must be at least 1, not {options.repetition_context_size}")
    if "" in options.stop:
        raise UserError("--stop takes strings that are not empty")


class TextWriter:
    """Turns token ids into text, holding back what may become a stop string or an incomplete character.

    Args:
        tokenizer: A byte-level transformers tokenizer.
        stop: Texts at which to stop.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._tokens: list[int] = []
        self._taken = 0  # characters of the decoded tokens that were moved to _held
        self._held = ""

    def add(self, token: int) -> str | None:
        """Take one token; returns "stop" at the end of text or at a stop string."""
        if token == self._tokenizer.eos_token_id:
            self._decode(final=True)
            self._cut()
            return "stop"
        self._tokens.append(token)
        self._decode(final=False)
        return "stop" if self._cut() else None

    def take(self, final: bool) -> str:
        """The text that is safe to show; with `final`, all that is left."""
        keep = 0
        if final:
            self._decode(final=True)
            self._cut()
        else:
            ends = (n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n]))
            keep = max(ends, default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def _decode(self, final: bool) -> None:
        text = self._tokenizer.decode(self._tokens)
        line_is_done = text.endswith("\n")
        if not final:
            text = text.rstrip("\ufffd")  # perhaps the beginning of a character
        self._held += text[self._taken :]
        self._taken = max(self._taken, len(text))
        if line_is_done or final:
            # What is done need not be decoded again with every token.
            self._tokens, self._taken = [], 0

    def _cut(self) -> bool:
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self._held, self._stop = self._held[: min(found)], []
        return bool(found)


class Meter:
    """Speeds and sizes of one generation.

    Args:
        prompt_tokens: Length of the prompt.
        peak_memory: Gives the most bytes that the framework has held.
    """

    def __init__(self, prompt_tokens: int, peak_memory: Callable[[], int]):
        self.tokens = 0
        self._prompt_tokens = prompt_tokens
        self._peak_memory = peak_memory
        self._start = self._now = self._first = time.perf_counter()
        self._cache_bytes = 0

    def count(self, cache_bytes: int) -> None:
        """Note a token, and the size of the cache with it."""
        self._now = time.perf_counter()
        if self.tokens == 0:
            self._first = self._now
        self.tokens += 1
        self._cache_bytes = max(self._cache_bytes, cache_bytes)

    def figures(self) -> dict[str, Any]:
        ttft, rest = self._first - self._start, self._now - self._first
        return {
            "prompt_tokens": self._prompt_tokens,
            "prompt_tps": self._prompt_tokens / ttft if ttft else 0.0,
            # The first token comes with the prompt; the others took `rest`.
            "generation_tps": (self.tokens - 1) / rest if rest else 0.0,
            "ttft_ms": ttft * 1e3,
            "kv_cache_bytes": self._cache_bytes,
            "peak_memory_bytes": self._peak_memory(),
        }
