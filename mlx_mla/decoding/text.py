"""Text from tokens, and the figures of a generation, for both backends and the server."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from mlx_mla.data.tokenizer import end_ids

LONGEST_WINDOW, SHORTEST_WINDOW = 64, 8
"""Tokens that are decoded together: where this is too many, and how many of them then stay."""


class TextWriter:
    """Turns token ids into text up to a stop string.

    It holds back text that may turn out to be the beginning of a stop string, and characters of
    which only some bytes are there.

    Args:
        tokenizer: A transformers tokenizer, or mlx-lm's wrapper of one.
        stop: Texts at which to stop. Their borders need not be borders of tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._ends = end_ids(tokenizer)
        self._stop = list(stop)
        self._tokens: list[int] = []  # the latest ones, enough to decode the next
        self._taken = 0  # characters of their text that were moved to _held
        self._held = ""

    def add(self, token: int) -> str | None:
        """Take one token; returns "stop" at the end of text or at a stop string."""
        if token in self._ends:
            self._decode(final=True)
            self._cut()
            self._stop = []  # none can follow, so nothing needs to be held back
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
            held = self._held
            begun = (
                n
                for s in self._stop
                for n in range(1, min(len(s), len(held) + 1))
                if held.endswith(s[:n])
            )
            keep = max(begun, default=0)
        end = len(self._held) - keep
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _decode(self, final: bool) -> None:
        text = self._tokenizer.decode(self._tokens)
        if not final:
            whole = len(text)
            text = text.rstrip("\ufffd")  # perhaps the beginning of a character
            final = len(text) == whole
        self._held += text[self._taken :]
        self._taken = max(self._taken, len(text))
        if final and len(self._tokens) >= LONGEST_WINDOW:
            # Decoding all tokens at every step would take ever longer. A few stay, since some
            # decoders drop a space in front of the first.
            self._tokens = self._tokens[-SHORTEST_WINDOW:]
            self._taken = len(self._tokenizer.decode(self._tokens))

    def _cut(self) -> bool:
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self._held, self._stop = self._held[: min(found)], []
        return bool(found)


class Meter:
    """Speeds and sizes of one generation.

    Args:
        prompt_tokens: Number of tokens of the prompt.
        peak_memory: Returns the framework's peak memory in bytes.
    """

    def __init__(self, prompt_tokens: int, peak_memory: Callable[[], int]):
        self.tokens = 0
        self._prompt_tokens = prompt_tokens
        self._peak_memory = peak_memory
        self._start = self._now = self._first = time.perf_counter()
        self._cache_bytes = 0

    def count(self, cache_bytes: int) -> None:
        """Count a token.

        Args:
            cache_bytes: Size of the cache with it.
        """
        self._now = time.perf_counter()
        if self.tokens == 0:
            self._first = self._now
        self.tokens += 1
        self._cache_bytes = max(self._cache_bytes, cache_bytes)

    def figures(self) -> dict[str, Any]:
        """Tokens per second, milliseconds to the first token, and bytes."""
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
