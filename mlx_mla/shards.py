"""Batches of token ids; a batch is a pure function of (seed, step), so a loader has no state to save."""

from collections.abc import Iterator
from functools import lru_cache

from mlx_mla.errors import UserError

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]
"""Inputs and next-token targets, both int32 of shape (batch, seq_len)."""


class TokenWindows:
    """Windows of `seq_len` tokens over one array of token ids, reshuffled every epoch.

    An epoch cuts the tokens at a random phase into windows that do not overlap and visits each
    window once, in random order. Both depend on (seed, epoch) alone.

    Args:
        tokens: Token ids, shape (n,).
        seq_len: Tokens in a window, beside the one more that the last target needs.
        seed: Decides phase and order.
        vocab_size: Rows of the model's embedding; MLX reads past them unchecked.

    Raises:
        UserError: If there are too few tokens for one window, or an id outside the vocabulary.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int, vocab_size: int, name: str = "the text"):
        if len(tokens) < seq_len + 1:
            raise UserError(
                f"{name} has {len(tokens):,} tokens, fewer than one context of {seq_len} and its next token; "
                "give more text or a smaller --seq-len"
            )
        if int(tokens.max()) >= vocab_size:
            raise UserError(
                f"{name} has token id {int(tokens.max())}, outside the vocabulary of {vocab_size}; "
                "check --tokenizer and --vocab-size"
            )
        self.tokens = tokens
        self.seq_len = seq_len
        self.seed = seed
        # The phase takes up to seq_len - 1 tokens from the front of an epoch.
        self.windows_per_epoch = max(1, (len(tokens) - seq_len) // seq_len)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of one step, shape (batch_size, seq_len)."""
        return self.rows(step * batch_size, batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """Sequences first, first + 1, ... of the order in which the run sees them, shape (count, seq_len)."""
        return self._gather([self._start(i) for i in range(first, first + count)])

    def sequential(self, batch_size: int, max_batches: int = 0) -> Iterator[Batch]:
        """Non-overlapping windows in order, for validation; the last batch may be smaller.

        Args:
            max_batches: Take only so many windows' worth of batches, spread evenly. 0: all.
        """
        count = (len(self.tokens) - 1) // self.seq_len
        wanted = min(count, max_batches * batch_size) if max_batches else count
        starts = [i * count // wanted * self.seq_len for i in range(wanted)]
        for i in range(0, wanted, batch_size):
            yield self._gather(starts[i : i + batch_size])

    def _make_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        slack = len(self.tokens) - 1 - self.windows_per_epoch * self.seq_len
        return int(rng.integers(0, slack + 1)), rng.permutation(self.windows_per_epoch)

    def _start(self, index: int) -> int:
        epoch, i = divmod(index, self.windows_per_epoch)
        phase, order = self._epoch(epoch)
        return phase + int(order[i]) * self.seq_len

    def _gather(self, starts: list[int]) -> Batch:
        rows = np.stack([self.tokens[s : s + self.seq_len + 1] for s in starts]).astype(np.int32)
        return rows[:, :-1], rows[:, 1:]
