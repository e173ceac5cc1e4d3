"""Batches: pure, complete, and the same however they are cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mla.data.shards import open_shard
from mlx_mla.data.windows import TokenWindows
from mlx_mla.errors import UserError


def windows(n: int, seq_len: int, seed: int = 0) -> TokenWindows:
    return TokenWindows(np.arange(n, dtype=np.uint16), seq_len, seed, 65536)


sizes = st.tuples(st.integers(2, 900), st.integers(1, 40)).filter(lambda s: s[0] > s[1])


@given(size=sizes, seed=st.integers(0, 9), step=st.integers(0, 10**6), batch=st.integers(1, 5))
def test_a_batch_depends_on_seed_and_step_alone(size, seed, step, batch):
    a, b = (windows(*size, seed=seed) for _ in range(2))
    b.batch(step // 2, batch)  # reading others first changes nothing
    for x, y in zip(a.batch(step, batch), b.batch(step, batch)):
        np.testing.assert_array_equal(x, y)


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


def test_a_sample_of_validation_is_spread_over_the_text():
    starts = [b[0][0, 0] for b in windows(1001, 10).sequential(2, max_batches=5)]
    assert starts == [0, 200, 400, 600, 800]


def test_too_little_text_and_foreign_ids_are_refused():
    with pytest.raises(UserError, match="has 10 tokens, fewer than one context of 10"):
        windows(10, 10)
    with pytest.raises(UserError, match="token id 99, outside the vocabulary of 99"):
        TokenWindows(np.arange(100), 10, 0, 99)


# --- several shards ---


def shards_of(sizes, folder):
    """Shards of the given sizes, in which every token of the whole is another."""
    found, first = [], 0
    for i, n in enumerate(sizes):
        np.save(folder / f"s_train_{i}.npy", np.arange(first, first + n, dtype=np.uint16))
        found.append(open_shard(folder / f"s_train_{i}.npy"))
        first += n
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


several = st.lists(st.integers(1, 300), min_size=1, max_size=5).filter(
    lambda sizes: max(sizes) > 30
)


@given(sizes=several, seq_len=st.integers(1, 30), seed=st.integers(0, 3), epoch=st.integers(0, 2))
def test_an_epoch_visits_every_window_of_every_shard_once(folder, sizes, seq_len, seed, epoch):
    data = TokenWindows(shards_of(sizes, folder), seq_len, seed, 65536)
    n = data.windows_per_epoch
    x, y = data.rows(epoch * n, n)
    assert len(np.unique(x)) == x.size
    np.testing.assert_array_equal(y, x + 1)
    # No window reaches over the end of its shard.
    ends = np.cumsum(sizes)
    np.testing.assert_array_equal(
        np.searchsorted(ends, x[:, 0], "right"), np.searchsorted(ends, y[:, -1], "right")
    )
    assert sum(size for size in sizes if size > seq_len) - x.size <= 2 * seq_len * len(sizes)


@given(sizes=several, first=st.integers(0, 1000), count=st.integers(1, 12), cut=st.integers(0, 12))
def test_rows_are_slices_of_one_order(folder, sizes, first, count, cut):
    cut = min(cut, count - 1)
    data = TokenWindows(shards_of(sizes, folder), 20, 0, 65536)
    whole = data.rows(first, count)[0]
    other = TokenWindows(shards_of(sizes, folder), 20, 0, 65536)
    # Before the head, by a reader that has read nothing else.
    tail = other.rows(first + cut, count - cut)[0]
    head = other.rows(first, cut)[0] if cut else whole[:0]
    np.testing.assert_array_equal(whole, np.concatenate([head, tail]))


@given(sizes=several, batch=st.integers(1, 7))
def test_validation_reads_all_shards_in_order(folder, sizes, batch):
    data = TokenWindows(shards_of(sizes, folder), 10, 0, 65536)
    x = np.concatenate([b[0].ravel() for b in data.sequential(batch)])
    firsts = np.cumsum([0, *sizes])
    expected = [np.arange((n - 1) // 10 * 10) + first for n, first in zip(sizes, firsts) if n > 10]
    np.testing.assert_array_equal(x, np.concatenate(expected))


@given(size=sizes, seed=st.integers(0, 9), step=st.integers(0, 1000))
def test_one_shard_is_read_as_an_array_is(folder, size, seed, step):
    shard = TokenWindows(shards_of([size[0]], folder), size[1], seed, 65536)
    array = windows(*size, seed=seed)
    np.testing.assert_array_equal(shard.batch(step, 3), array.batch(step, 3))
    for a, b in zip(shard.sequential(2), array.sequential(2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_order_of_a_text_is_what_it_was_in_the_first_release():
    """Checkpoints of then are resumed with it."""
    data = windows(1000, 10, 1337)
    for epoch in (0, 1):
        rng = np.random.default_rng([1337, epoch])
        starts = int(rng.integers(0, 10)) + rng.permutation(99) * 10
        np.testing.assert_array_equal(data.rows(epoch * 99, 99)[0][:, 0], starts)


def test_epochs_take_the_shards_in_different_orders(folder):
    data = TokenWindows(shards_of([100] * 6, folder), 10, 0, 65536)
    orders = [tuple(dict.fromkeys(data.rows(e * 54, 54)[0][:, 0] // 100)) for e in range(4)]
    assert all(len(order) == 6 for order in orders)
    assert len(set(orders)) > 1
