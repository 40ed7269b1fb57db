"""The order of sequences: every one once, the same everywhere, found at once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightschool.data.shards.permutation import Permutation, SequenceOrder


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_bijection(size, key):
    assert np.array_equal(np.sort(Permutation(size, key)(np.arange(size))), np.arange(size))


def test_a_permutation_depends_on_its_key_and_on_nothing_else():
    places = np.arange(1000)
    first = Permutation(1000, "a")(places)
    assert np.array_equal(first, Permutation(1000, "a")(places))
    assert not np.array_equal(first, Permutation(1000, "b")(places))
    assert np.array_equal(first[500:510], Permutation(1000, "a")(places[500:510]))


def test_it_looks_random():
    # Of a random order about 1 in N places keeps its index, and neighbours end up far apart.
    out = Permutation(100_000, "a")(np.arange(100_000))
    assert np.count_nonzero(out == np.arange(100_000)) < 10
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.02


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    st.integers(1, 5),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_sequence_once(counts, group_shards, epoch):
    order = SequenceOrder(counts, seed=7, group_shards=group_shards)
    shards, sequences = order.locate(epoch, np.arange(sum(counts)))
    seen = sorted(zip(shards.tolist(), sequences.tolist(), strict=True))
    assert seen == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]


@given(st.integers(0, 60), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_any_cut_of_the_order_is_the_same_order(start, length):
    order = SequenceOrder([17, 3, 41, 29, 11], seed=1, group_shards=2)
    whole = order.locate(2, np.arange(101))
    part = SequenceOrder([17, 3, 41, 29, 11], seed=1, group_shards=2).locate(2, np.arange(start, start + length))
    for mine, theirs in zip(part, whole, strict=True):
        assert np.array_equal(mine, theirs[start : start + length])


def test_epochs_and_seeds_differ():
    places = np.arange(100)
    first = SequenceOrder([100], seed=1, group_shards=1)
    assert not np.array_equal(first.locate(0, places)[1], first.locate(1, places)[1])
    assert not np.array_equal(
        first.locate(0, places)[1], SequenceOrder([100], seed=2, group_shards=1).locate(0, places)[1]
    )


def test_only_the_shards_of_a_group_are_at_hand_at_a_time():
    order = SequenceOrder([10] * 8, seed=3, group_shards=2)
    shards, _ = order.locate(0, np.arange(80))
    for start in range(0, 80, 20):
        assert len(set(shards[start : start + 20].tolist())) == 2
    upcoming = order.upcoming_shards(0, 25)
    assert len(upcoming) == 6
    assert set(upcoming[:2]) == set(shards[20:40].tolist())


def test_a_place_past_the_end_is_refused():
    with pytest.raises(IndexError, match="10 sequences"):
        SequenceOrder([10], seed=3, group_shards=2).locate(0, np.array([10]))
