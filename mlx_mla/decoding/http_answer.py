"""The generation of mlx-lm's server, with what `mlx_mla.serve` changes in it: stop texts that are
matched on text, cached prompts that come back, and an end that is noticed."""

import collections
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache

from mlx_mla.decoding.text import TextWriter
from mlx_mla.errors import UserError


class PromptCache(LRUPromptCache):
    """mlx-lm's, which leaves at least one token to compute, where the next one's logits come from.

    A prompt that equals a cached prompt and its answer would leave none.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or rest:
            return cache, rest
        trim_prompt_cache(cache, 1)
        return cache, tokens[-1:]


class Answer:
    """The text of an answer; stands where mlx-lm keeps its stop sequences.

    Those match whole tokens. This matches the text, and is asked once for every token.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], max_tokens: int):
        self._writer, self._left = TextWriter(tokenizer, stop), max_tokens
        self.machine: Any = None
        """mlx-lm 0.31's, which tells text, reasoning and tool calls apart by their tokens."""
        self.pieces = collections.deque[str]()
        """The text that each token completes."""

    def matcher(self) -> "Answer":
        return self

    def advance(self, token: int) -> bool:
        """Take a token; returns whether the answer ends with it."""
        self._left -= 1
        ended = self._writer.add(token) is not None
        self.pieces.append(self._writer.take(final=not ended and self._left == 0))
        return ended

    def make_state(self) -> Any:
        return self.machine.make_state()

    def match(self, state: Any, token: int) -> tuple[Any, Any, Any]:
        state, match, name = self.machine.match(state, token)
        return (state, (token,), None) if self.advance(token) else (state, match, name)


class Generator(server.ResponseGenerator):
    """mlx-lm's, with answers as `generate` writes them, and prompts tokenized by the handlers."""

    def __init__(self, provider: Any):
        self.problem: BaseException | None = None
        self._tokenizer_lock = threading.Lock()
        self._handlers_tokenizer = provider.new_tokenizer()
        super().__init__(provider, PromptCache(provider.cli_args.prompt_cache_size))

    @property
    def is_healthy(self) -> bool:
        return self.problem is None

    def tokenize(self, request: Any, args: Any) -> list[int]:
        """The request's token ids, which the generation thread will use.

        Raises:
            UserError: If the chat template refuses the messages.
        """
        try:
            with self._tokenizer_lock:
                request.tokenized = super()._tokenize(self._handlers_tokenizer, request, args)
        except Exception as e:  # whatever the template of a model runs into
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
                # The handler would drop the text; where there is no reason, it assumes this one.
                response.finish_reason = None
                response.state = "normal"  # to mlx-lm 0.31
            yield response

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        return request.tokenized

    def _make_state_machine(
        self, model_key: Any, tokenizer: Any, stop_words: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        answer: Answer = stop_words
        answer.machine, rest = super()._make_state_machine(
            model_key, tokenizer, (), *args, **kwargs
        )
        return answer, rest

    def _generate(self) -> None:
        try:
            super()._generate()
        except BaseException as e:  # Rust's panics among them
            self.problem = e
