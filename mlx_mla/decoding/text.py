"""What decoding shares between backends: checks, text from tokens, figures."""

import time
from collections.abc import Callable, Sequence
from typing import Any


class TextWriter:
    """Turns token ids into text, holding back what may become a stop string or an incomplete
    character.

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
        text, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
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
