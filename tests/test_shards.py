"""Batches: pure, complete, and the same however they are cut."""

from mlx_mla.errors import UserError
from mlx_mla.shards import TokenWindows

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st


def windows(n: int, seq_len: int, seed: int = 0) -> TokenWindows:
    return TokenWindows(np.arange(n, dtype=np.uint16), seq_len, seed, 65536)


sizes = st.tuples(st.integers(2, 900), st.integers(1, 40)).filter(lambda s: s[0] > s[1])


@given(size=sizes, seed=st.integers(0, 9), step=st.integers(0, 10**6), batch=st.integers(1, 5))
def test_a_batch_depends_on_seed_and_step_alone(size, seed, step, batch):
    a, b = windows(*size, seed), windows(*size, seed)
    b.batch(step // 2, batch)  # reading others first changes nothing
    for x, y in zip(a.batch(step, batch), b.batch(step, batch)):
        np.testing.assert_array_equal(x, y)


@given(size=sizes, step=st.integers(0, 1000))
def test_targets_are_the_next_tokens(size, step):
    x, y = windows(*size).batch(step, 3)
    assert x.shape == y.shape == (3, size[1])
    np.testing.assert_array_equal(y, x + 1)


@given(size=sizes, seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_window_once(size, seed, epoch):
    data = windows(*size, seed)
    n = data.windows_per_epoch
    tokens = np.concatenate([data.batch(epoch * n + i, 1)[0].ravel() for i in range(n)])
    assert len(np.unique(tokens)) == len(tokens) == n * size[1]
    # What is left out at both ends is less than two windows.
    assert size[0] - len(tokens) <= 2 * size[1]


@given(size=sizes, step=st.integers(0, 1000))
def test_one_batch_is_two_half_batches(size, step):
    data = windows(*size)
    whole = data.batch(step, 6)[0]
    halves = np.concatenate([data.batch(2 * step, 3)[0], data.batch(2 * step + 1, 3)[0]])
    np.testing.assert_array_equal(whole, halves)


def test_seeds_and_epochs_differ():
    first = [windows(1000, 10, seed).batch(0, 8)[0] for seed in (0, 1)]
    assert not np.array_equal(*first)
    data = windows(1000, 10)
    assert not np.array_equal(data.batch(0, 1)[0], data.batch(data.windows_per_epoch, 1)[0])


@given(size=sizes, batch=st.integers(1, 7))
def test_validation_reads_everything_once_in_order(size, batch):
    data = windows(*size)
    x = np.concatenate([b[0].ravel() for b in data.sequential(batch)])
    np.testing.assert_array_equal(x, np.arange((size[0] - 1) // size[1] * size[1]))


def test_a_sample_of_validation_is_spread_over_the_text():
    starts = [b[0][0, 0] for b in windows(1001, 10).sequential(2, max_batches=5)]
    assert starts == [0, 200, 400, 600, 800]


def test_too_little_text_and_foreign_ids_are_refused():
    with pytest.raises(UserError, match="has 10 tokens, fewer than one context of 10"):
        windows(10, 10)
    with pytest.raises(UserError, match="token id 99, outside the vocabulary of 99"):
        TokenWindows(np.arange(100), 10, 0, 99)
