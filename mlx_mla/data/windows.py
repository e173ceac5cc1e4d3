"""Batches of token ids. A batch is a pure function of (seed, step), so the loader has no state to
save."""

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Optional

import numpy as np

from mlx_mla.data.shards import Shard
from mlx_mla.errors import UserError

Batch = tuple[np.ndarray, np.ndarray]
"""Inputs and next-token targets, both int32 of shape (batch, seq_len)."""


class TokenWindows:
    """Windows of `seq_len` tokens over arrays of token ids, reshuffled every epoch.

    An epoch visits the shards in random order. Each shard is cut into disjoint windows, starting at
    a random phase, and its windows are visited once, in random order. The phase and both orders
    depend only on (seed, epoch, shard). A training run is therefore one endless sequence of
    windows, which `rows` indexes.

    Args:
        tokens: Token ids, shape (n,), or shards of them. Shards with fewer than seq_len + 1 tokens
            are not used.
        seq_len: Tokens in a window, without the additional one that the last target needs.
        seed: Determines the phases and orders.
        vocab_size: Rows of the model's embedding. MLX reads past them without an error.
        name: Name of the tokens in messages.

    Raises:
        UserError: If there are too few tokens for one window, or an id lies outside the vocabulary.
            Only samples of a shard are checked here; the rest is checked as it is read.
    """

    def __init__(
        self,
        tokens: np.ndarray | Sequence[Shard],
        seq_len: int,
        seed: int,
        vocab_size: int,
        name: str = "the text",
    ):
        self.seq_len, self.seed, self.vocab_size, self.name = seq_len, seed, vocab_size, name
        self._shards: Optional[list[Shard]] = None
        if isinstance(tokens, np.ndarray):
            self._tokens = [tokens]
        else:
            self._shards = [shard for shard in tokens if len(shard.tokens) > seq_len]
            self._tokens = [shard.tokens for shard in self._shards]
        longest = max((len(t) for t in (self._tokens or [s.tokens for s in tokens])), default=0)
        if longest < seq_len + 1:
            where = "" if self._shards is None else " in a shard"
            raise UserError(
                f"{name} has {longest:,} tokens{where}, fewer than one context of {seq_len} and "
                "its next token; give more text or a smaller --seq-len"
            )
        self._look_at_ids()
        # The phase takes up to seq_len - 1 tokens from the front of a shard.
        self._windows = [max(1, (len(t) - seq_len) // seq_len) for t in self._tokens]
        self.windows_per_epoch = sum(self._windows)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def rows(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count - 1` of the run, shape (count, seq_len)."""
        return self._gather([self._place(i) for i in range(first, first + count)])

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of one step, shape (batch_size, seq_len)."""
        return self.rows(step * batch_size, batch_size)

    def sequential(self, batch_size: int, max_batches: int = 0) -> Iterator[Batch]:
        """Yield disjoint windows in order, for validation. The last batch may be smaller.

        Args:
            max_batches: Maximum number of batches, whose windows are spread evenly over the tokens.
                0: all.
        """
        ends = list(itertools.accumulate((len(t) - 1) // self.seq_len for t in self._tokens))
        count = ends[-1]
        wanted = min(count, max_batches * batch_size) if max_batches else count
        for i in range(0, wanted, batch_size):
            places = []
            for j in range(i, min(i + batch_size, wanted)):
                window = j * count // wanted
                shard = int(np.searchsorted(ends, window, side="right"))
                places.append((shard, (window - (ends[shard - 1] if shard else 0)) * self.seq_len))
            yield self._gather(places)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the shards, and the index in the epoch at which each one ends."""
        order = np.random.default_rng([self.seed, epoch, len(self._tokens)]).permutation(
            len(self._tokens)
        )
        return order, np.cumsum([self._windows[s] for s in order])

    def _make_order(self, epoch: int, shard: int) -> tuple[int, np.ndarray]:
        """Return the phase of a shard and the order of its windows."""
        rng = np.random.default_rng([self.seed, epoch, shard])
        slack = len(self._tokens[shard]) - 1 - self._windows[shard] * self.seq_len
        return int(rng.integers(0, slack + 1)), rng.permutation(self._windows[shard])

    def _place(self, index: int) -> tuple[int, int]:
        """Return the shard of a sequence and the index of its first token."""
        epoch, i = divmod(index, self.windows_per_epoch)
        shards, ends = self._epoch(epoch)
        at = int(np.searchsorted(ends, i, side="right"))
        shard = int(shards[at])
        phase, order = self._order(epoch, shard)
        return shard, phase + int(order[i - (int(ends[at - 1]) if at else 0)]) * self.seq_len

    def _gather(self, places: list[tuple[int, int]]) -> Batch:
        if self._shards is not None:
            for shard in sorted({shard for shard, _ in places}):
                self._shards[shard].check()
        rows = np.stack([self._tokens[shard][s : s + self.seq_len + 1] for shard, s in places])
        if int(rows.max()) >= self.vocab_size:
            for (shard, start), row in zip(places, rows):
                self._check_ids(shard, start, row)
        rows = rows.astype(np.int32)
        return rows[:, :-1], rows[:, 1:]

    def _look_at_ids(self) -> None:
        for i, tokens in enumerate(self._tokens):
            for start, ids in [(0, tokens)] if self._shards is None else self._shards[i].samples():
                self._check_ids(i, start, ids)

    def _check_ids(self, shard: int, start: int, ids: np.ndarray) -> None:
        if int(ids.max()) < self.vocab_size:
            return
        at = int(np.argmax(ids >= self.vocab_size))
        where, name = "", self.name
        if self._shards is not None:
            own = self._shards[shard]
            name, where = str(own.path), f" at token {own.first + start + at:,}"
        raise UserError(
            f"{name} has token id {int(ids[at])}{where}, outside the vocabulary of "
            f"{self.vocab_size}; check --tokenizer and --vocab-size"
        )
