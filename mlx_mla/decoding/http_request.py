"""What a request to `mlx_mla.serve` may ask: mlx-lm's fields, of the types and in the ranges that
its generation thread survives."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

from mlx_mla.decoding.request import GREEDY_BELOW, LARGEST_INT, outside
from mlx_mla.errors import UserError
from mlx_mla.files import encodable

# Numbers with the bounds of our own options, others with mlx-lm's or OpenAI's.
OPTIONS = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "seed": "seed"}
NUMBERS = {
    "repetition_penalty": (0, 100), "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100), "xtc_probability": (0, 1), "xtc_threshold": (0, 0.5),
}  # fmt: skip
WHOLE = (
    "max_tokens", "max_completion_tokens", "top_k", "top_logprobs", "num_draft_tokens", "seed",
    "repetition_context_size", "presence_context_size", "frequency_context_size",
)  # fmt: skip
KINDS = {
    "stream": bool, "logprobs": bool, "tools": list, "role_mapping": dict, "stream_options": dict,
    "chat_template_kwargs": dict, "logit_bias": dict, "messages": list, "prompt": str,
}  # fmt: skip
BIAS, MOST_STOPS = 100, 16
ONLY = "this server has no others"


@dataclasses.dataclass
class RequestChecks:
    """The limits of a served model."""

    tokenizer: Any
    """A transformers tokenizer."""
    n_positions: int
    vocab_size: int
    names: Sequence[str]
    """What requests may call the model."""
    max_tokens: int
    """Most tokens of an answer to a request that does not say."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # tokenizers are not for several threads at once

    def check(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """The request as mlx-lm can take it.

        Args:
            body: The JSON object of the request.
            chat: Whether it has `messages`, else a `prompt`.

        Raises:
            UserError: Naming the field.
        """
        body = {k: v for k, v in body.items() if v is not None}
        self._check_numbers(body)
        for name, kind in KINDS.items():
            if not isinstance(body.get(name, kind()), kind):
                raise UserError(f"{name} must be of type {kind.__name__}")
        if body.get("model", self.names[0]) not in self.names:
            raise UserError(f"model must be {self.names[-1]} or {self.names[0]}; {ONLY}")
        if "adapters" in body or body.get("draft_model", "default_model") != "default_model":
            raise UserError(f"adapters and draft_model must be left out; {ONLY}")
        stop = body.get("stop", [])
        stop = [stop] if isinstance(stop, str) else stop
        texts = isinstance(stop, list) and all(_is_text(s) and s for s in stop)
        if not texts or len(stop) > MOST_STOPS:
            raise UserError(f"stop must be a text, or up to {MOST_STOPS} texts, that are not empty")
        if "stream_options" in body:
            body["stream_options"] = {"include_usage": body["stream_options"].get("include_usage")}
        self._check_bias(body.get("logit_bias", {}))
        tokens = self._tokens(body, chat)
        room = self.n_positions - tokens
        asked = body.get("max_completion_tokens", body.get("max_tokens"))
        if tokens == 0:
            raise UserError("the prompt has no tokens; give some text")
        if room < (asked or 1):
            answer = "" if asked is None else f" and max_tokens {asked}"
            raise UserError(
                f"{tokens} prompt tokens{answer} exceed the model's n_positions={self.n_positions}"
            )
        return {"max_tokens": min(self.max_tokens, room), **body, "stop": stop}

    def _check_numbers(self, body: dict[str, Any]) -> None:
        for name in (*OPTIONS, *NUMBERS, *WHOLE):
            if name not in body:
                continue
            value = body[name]
            whole = name in WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise UserError(f"{name} must be a {'whole ' if whole else ''}number")
            if name in OPTIONS and (problem := outside(OPTIONS[name], value)):
                raise UserError(f"{name} {problem.split('; ')[0]}")
            lowest = 1 if name in ("max_tokens", "max_completion_tokens") else -1
            low, high = NUMBERS.get(name, (lowest, LARGEST_INT))
            if name not in OPTIONS and not low <= value <= high:
                raise UserError(f"{name} must be from {low} to {high}")
        if not 0 <= body.get("top_k", 0) < self.vocab_size:
            raise UserError(f"top_k must be from 0 (off) to {self.vocab_size - 1}")
        if body.get("temperature", 1) < GREEDY_BELOW:
            body["temperature"] = 0

    def _check_bias(self, bias: dict[str, Any]) -> None:
        for token, value in bias.items():
            known = token.isdecimal() and len(token) < 12 and int(token) < self.vocab_size
            if not known or not isinstance(value, (int, float)) or not -BIAS <= value <= BIAS:
                raise UserError(
                    f"logit_bias must give token ids below {self.vocab_size} numbers from -{BIAS} "
                    f"to {BIAS}"
                )

    def _tokens(self, body: dict[str, Any], chat: bool) -> int:
        """Number of tokens of the prompt, as mlx-lm makes it."""
        if not chat:
            if not _is_text(body.get("prompt")):
                raise UserError("prompt must be one text")
            with self._lock:
                return len(self.tokenizer.encode(body["prompt"]))
        from mlx_lm.server import convert_chat

        roles, messages = body.get("role_mapping", {}), body.get("messages")
        if not messages or not all(
            isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content"))
            for m in messages
        ):
            raise UserError("messages must be a list of objects with the texts role and content")
        if not all(_is_text(r) for r in roles.values()):
            raise UserError("role_mapping must give each role a text")
        with self._lock:
            if self.tokenizer.chat_template:
                return len(self.tokenizer.apply_chat_template(messages, tokenize=True))
            return len(self.tokenizer.encode(convert_chat(messages, roles)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and encodable(value)
