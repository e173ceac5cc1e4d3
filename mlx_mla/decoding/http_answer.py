"""How `mlx_mla.serve` changes the generation of mlx-lm's server: stop strings are matched in the
text, and a cached prompt can be sent again."""

import collections
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache

from mlx_mla.decoding.text import TextWriter
from mlx_mla.errors import UserError


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of prompts, which always leaves at least one token to compute.

    The logits of the next token come from that token. A prompt that equals a cached prompt with its
    answer would leave none.
    """

    is_hidden = False
    """Whether every prompt is to be read whole."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        if self.is_hidden:
            return None, tokens
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]


class Answer:
    """The text of an answer, in the place of mlx-lm's stop sequences.

    mlx-lm's sequences match whole tokens. This object is called once for each token, and matches
    the stop strings in the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], max_tokens: int):
        self._writer, self._left = TextWriter(tokenizer, stop), max_tokens
        self.pieces = collections.deque[str]()
        """The text that each token completes."""

    def matcher(self) -> "Answer":
        return self

    def advance(self, token: int) -> bool:
        """Take a token. Returns True if the answer ends with it."""
        self._left -= 1
        ended = self._writer.add(token) is not None
        self.pieces.append(self._writer.take(final=not ended and self._left == 0))
        return ended


class Generator(server.ResponseGenerator):
    """mlx-lm's generator, with `generate`'s texts. The handlers' threads tokenize the prompts."""

    def __init__(self, provider: Any):
        self._tokenizer_lock = threading.Lock()
        self._handlers_tokenizer = provider.new_tokenizer()
        super().__init__(provider, PromptCache(provider.cli_args.prompt_cache_size))

    def tokenize(self, request: Any, args: Any) -> list[int]:
        """Tokenize a request for the generation thread; also returns the token ids.

        Raises:
            UserError: If the chat template refuses the messages.
        """
        try:
            with self._tokenizer_lock:
                request.tokenized = super()._tokenize(self._handlers_tokenizer, request, args)
        except Exception as e:  # a template can raise any type
            if request.request_type != "chat":
                raise
            raise UserError(f"the messages do not fit the model's chat template: {e}") from None
        return request.tokenized[0]

    def generate(
        self, request: Any, args: Any, progress_callback: Any = None
    ) -> tuple[Any, Iterator[server.Response]]:
        answer = Answer(self.model_provider.tokenizer, args.stop_words, args.max_tokens)
        args.stop_words = answer
        context, responses = super().generate(request, args, progress_callback)
        return context, self._with_text(responses, answer)

    def _with_text(self, responses: Any, answer: Answer) -> Iterator[server.Response]:
        for response in responses:
            response.text = answer.pieces.popleft()
            if response.finish_reason == "stop":
                # With a reason, the handler drops the text. Without one, it reports "stop".
                response.finish_reason = None
            yield response

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        return request.tokenized

    def _make_state_machine(
        self, model_key: Any, tokenizer: Any, stop_words: Any
    ) -> tuple[Answer, Any]:
        return stop_words, super()._make_state_machine(model_key, tokenizer, ())[1]

    def _serve_single(self, request: Any, *args: Any) -> None:
        # Outside of batches, mlx-lm's penalties see only the part of a prompt that is not cached.
        logits = request[2].logits
        self.prompt_cache.is_hidden = any(
            getattr(logits, f"{name}_penalty") for name in ("repetition", "presence", "frequency")
        )
        try:
            super()._serve_single(request, *args)
        finally:
            self.prompt_cache.is_hidden = False
