"""The requests that `mlx_mla.serve` accepts: the fields of mlx-lm's server, limited to types and
ranges with which its generation thread cannot fail."""

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Optional

from mlx_mla.decoding.request import (
    GREEDY_BELOW,
    LARGEST_INT,
    GenerationOptions,
    check_prompt,
    check_room,
)
from mlx_mla.errors import UserError
from mlx_mla.fields import between, bounds_of
from mlx_mla.files import encodable

OPTIONS = bounds_of(GenerationOptions)
NUMBERS = {
    "temperature": OPTIONS["temp"],
    **{name: OPTIONS[name] for name in ("top_p", "min_p", "repetition_penalty")},
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), between(-100, 100)),
    "xtc_probability": between(0, 1),
    "xtc_threshold": between(0, 0.5),
}
CONTEXT_SIZES = ("repetition_context_size", "presence_context_size", "frequency_context_size")
WHOLE_NUMBERS = {
    "seed": OPTIONS["seed"],
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), between(1, LARGEST_INT)),
    **dict.fromkeys((*CONTEXT_SIZES, "num_draft_tokens", "top_k"), between(0, LARGEST_INT)),
    "top_logprobs": between(-1, 11),
}
TYPES = {
    "stream": bool, "logprobs": bool, "tools": list, "role_mapping": dict, "stream_options": dict,
    "chat_template_kwargs": dict, "logit_bias": dict, "messages": list, "prompt": str,
}  # fmt: skip
FIXED = {"n": 1, "best_of": 1, "echo": False, "suffix": "", "response_format": {"type": "text"}}
"""OpenAI's fields that mlx-lm ignores, with the value that describes what it does."""
LARGEST_BIAS, MOST_STOPS, LONGEST_STOP = 100, 16, 1000


@dataclasses.dataclass
class RequestChecks:
    """The limits of a served model."""

    n_positions: int
    vocab_size: int
    names: Sequence[str]
    """Names of the model in requests."""
    max_tokens: int
    """Maximum tokens of an answer if the request has no `max_tokens`."""

    def check(self, body: dict[str, Any], chat: bool) -> dict[str, Any]:
        """Check every field of a request, and normalize its messages as mlx-lm does.

        Args:
            body: The JSON object of the request.
            chat: True for a request with `messages`, False for one with a `prompt`.

        Raises:
            UserError: If a field is wrong; the message names it.
        """
        body = {name: value for name, value in body.items() if value is not None}
        for name, value in FIXED.items():
            found = body.pop(name, value)
            if type(found) is not type(value) or found != value:
                raise UserError(f"{name} must be {value!r} or left out")
        self._check_numbers(body)
        for name, expected in TYPES.items():
            if not isinstance(body.get(name, expected()), expected):
                raise UserError(f"{name} must be of type {expected.__name__}")
        if body.get("model", self.names[0]) not in self.names:
            raise UserError(f"model must be {self.names[-1]} or {self.names[0]}")
        if "adapters" in body or body.get("draft_model", "default_model") != "default_model":
            raise UserError("adapters and draft_model are not supported; leave them out")
        body["stop"] = _stop_texts(body.get("stop", []))
        if "stream_options" in body:
            body["stream_options"] = {"include_usage": body["stream_options"].get("include_usage")}
        self._check_bias(body.get("logit_bias", {}))
        check_template_arguments("chat_template_kwargs", body.get("chat_template_kwargs", {}))
        if chat:
            _normalize_messages(body)
        elif not _is_text(body.get("prompt")):
            raise UserError("prompt must be one string")
        return body

    def room(self, prompt: Sequence[int], asked: Optional[int]) -> int:
        """Maximum number of tokens to generate.

        Args:
            asked: The request's `max_tokens`, if it has one.

        Raises:
            UserError: If there is no prompt, or the context has no room for it and the answer.
        """
        check_prompt(prompt, self.vocab_size)
        room = check_room(len(prompt), asked, self.n_positions, "max_tokens")
        return min(self.max_tokens, room) if asked is None else asked

    def _check_numbers(self, body: dict[str, Any]) -> None:
        for name in body.keys() & {**NUMBERS, **WHOLE_NUMBERS}.keys():
            value, whole = body[name], name in WHOLE_NUMBERS
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise UserError(f"{name} must be a {'whole ' if whole else ''}number")
            off = name == "repetition_penalty" and value == 0  # to mlx-lm
            problem = (WHOLE_NUMBERS if whole else NUMBERS)[name].problem(value)
            if problem and not off:
                raise UserError(f"{name} {problem}")
            if not whole:
                body[name] = float(value)  # mlx-lm takes no int for some
        if not 0 <= body.get("top_k", 0) < self.vocab_size:
            raise UserError(f"top_k must be from 0 (off) to {self.vocab_size - 1}")
        if body.get("top_logprobs", 0) > self.vocab_size:
            raise UserError(f"top_logprobs must be at most {self.vocab_size}")
        if body.get("temperature", 1) < GREEDY_BELOW:
            body["temperature"] = 0

    def _check_bias(self, bias: dict[str, Any]) -> None:
        for token, value in bias.items():
            known = token.isdecimal() and len(token) < 12 and int(token) < self.vocab_size
            number = isinstance(value, (int, float)) and -LARGEST_BIAS <= value <= LARGEST_BIAS
            if not known or not number:
                raise UserError(
                    f"logit_bias must map token ids below {self.vocab_size} to numbers from "
                    f"-{LARGEST_BIAS} to {LARGEST_BIAS}"
                )


def check_template_arguments(name: str, values: dict[str, Any]) -> None:
    """Refuse variables of a chat template that are arguments of `apply_chat_template`.

    One of them is the template itself, and a template can run forever.

    Raises:
        UserError: If there are any; the message names the field or flag.
    """
    from transformers import PreTrainedTokenizerBase

    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if taken := sorted(values.keys() & arguments.keys()):
        raise UserError(f"{name} must leave out {', '.join(taken)}; this server sets them")


def _stop_texts(stop: Any) -> list[str]:
    texts = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(texts, list)
        or len(texts) > MOST_STOPS
        or not all(_is_text(text) and 0 < len(text) <= LONGEST_STOP for text in texts)
    ):
        raise UserError(
            f"stop must be one string, or up to {MOST_STOPS}, of 1 to {LONGEST_STOP} characters"
        )
    return texts


def _normalize_messages(body: dict[str, Any]) -> None:
    """Turn the content of messages into text, as mlx-lm does before it applies a template."""
    from mlx_lm.server import process_message_content

    messages, roles = body.get("messages"), body.get("role_mapping", {})
    if not messages or not all(isinstance(m, dict) and _is_text(m.get("role")) for m in messages):
        raise UserError("messages must be a list of objects, each with a string as role")
    try:
        normal = copy.deepcopy(messages)  # mlx-lm parses the arguments of tool calls again
        process_message_content(normal)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"messages: the content or tool_calls of one are malformed ({e})") from None
    for message, same in zip(messages, normal):
        message["content"] = same["content"]
        if not _is_text(message["content"]):
            raise UserError("messages: content must be a string, a list of text parts, or null")
    if not all(_is_text(role) for role in roles.values()):
        raise UserError("role_mapping must map each role to a string")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and encodable(value)
