"""Advice that a command has for its user, kept until it is done: a refusal stays one line."""

import sys

_waiting: list[str] = []


def add(text: str | None) -> None:
    """Keep a line to be said on success, once however often it is added; None is nothing to say."""
    if text is not None and text not in _waiting:
        _waiting.append(text)


def drop() -> None:
    """Forget what an earlier command in this process had to say."""
    _waiting.clear()


def say() -> None:
    """Print the lines to stderr."""
    for text in _waiting:
        print(text, file=sys.stderr)
    drop()
