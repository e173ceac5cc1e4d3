"""Turn generated tokens into text, for both backends and the server."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

from mlx_mla.data.tokenizer import end_ids

LONGEST_WINDOW, SHORTEST_WINDOW = 64, 8
"""Maximum number of tokens that are decoded together, and how many of them then stay."""


class TextWriter:
    """Turns token ids into text up to a stop string.

    It holds back text that may be the beginning of a stop string, and incomplete characters.

    Args:
        tokenizer: A transformers tokenizer, or mlx-lm's wrapper of one.
        stop: Strings at which to stop. They may begin and end within tokens.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self._tokenizer = tokenizer
        self._ends = end_ids(tokenizer)
        self._stop = list(stop)
        self._tokens: list[int] = []  # the latest tokens, enough to decode the next one
        self._taken = 0  # characters of their text that were moved to _held
        self._held = ""

    def add(self, token: int) -> str | None:
        """Take one token. Returns "stop" at the end of text or at a stop string, else None."""
        if token in self._ends:
            self._decode(final=True)
            self._cut()
            self._stop = []  # none can follow, so nothing needs to be held back
            return "stop"
        self._tokens.append(token)
        self._decode(final=False)
        return "stop" if self._cut() else None

    def take(self, final: bool) -> str:
        """The text that can be shown; with `final`, all that is left."""
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
            text = text.rstrip("\ufffd")  # perhaps an incomplete character
            final = len(text) == whole
        self._held += text[self._taken :]
        self._taken = max(self._taken, len(text))
        if final and len(self._tokens) >= LONGEST_WINDOW:
            # Decoding all tokens would take longer at every step. A few stay, since some decoders
            # drop the space before the first token.
            self._tokens = self._tokens[-SHORTEST_WINDOW:]
            self._taken = len(self._tokenizer.decode(self._tokens))

    def _cut(self) -> bool:
        found = [i for s in self._stop if (i := self._held.find(s)) >= 0]
        if found:
            self._held, self._stop = self._held[: min(found)], []
        return bool(found)


@dataclasses.dataclass
class Piece:
    """A piece of generated text, with the figures so far."""

    text: str
    token_ids: list[int]
    """The tokens since the last piece."""
    figures: dict[str, Any]
    """prompt_tokens, prompt_tps, generation_tps, ttft_ms, kv_cache_bytes and peak_memory_bytes;
    with a draft model also accepted_draft_tokens."""
    finish_reason: Optional[str] = None
    """"stop" or "length" on the last piece, else None."""


class Continuation:
    """The text that follows one prompt, up to a number of tokens, and its speeds and sizes.

    Args:
        tokenizer: See `TextWriter`.
        max_tokens: Number of tokens after which to stop.
        peak_memory: Returns the framework's peak memory in bytes.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        prompt_tokens: int,
        max_tokens: int,
        peak_memory: Callable[[], int],
    ):
        self.tokens = 0
        self._writer = TextWriter(tokenizer, stop)
        self._prompt_tokens, self._max_tokens = prompt_tokens, max_tokens
        self._peak_memory = peak_memory
        self._start = self._first = time.perf_counter()
        self._cache_bytes = 0

    def add(self, token: int, cache_bytes: int) -> Piece:
        """Take a token, with the size of the cache that holds it; returns the text it completes."""
        now = time.perf_counter()
        if self.tokens == 0:
            self._first = now
        self.tokens += 1
        self._cache_bytes = max(self._cache_bytes, cache_bytes)
        reason = self._writer.add(token)
        if reason is None and self.tokens == self._max_tokens:
            reason = "length"
        text = self._writer.take(final=reason == "length")
        ttft, rest = self._first - self._start, now - self._first
        figures = {
            "prompt_tokens": self._prompt_tokens,
            "prompt_tps": self._prompt_tokens / ttft if ttft else 0.0,
            # The first token comes with the prompt; the others took `rest`.
            "generation_tps": (self.tokens - 1) / rest if rest else 0.0,
            "ttft_ms": ttft * 1e3,
            "kv_cache_bytes": self._cache_bytes,
            "peak_memory_bytes": self._peak_memory(),
        }
        return Piece(text, [token], figures, reason)
