import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.data.loader import Positions
from t2i.data.order import Stream, epoch_order, hash64, uniform

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


@given(sizes, st.integers(-5, 2**63), st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_reads_every_sample_exactly_once(shard_sizes, seed, epoch, window):
    order = epoch_order(shard_sizes, seed, epoch, window)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(shard_sizes)))


@settings(deadline=None)
@given(sizes, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.data())
def test_ranks_and_workers_together_read_each_epoch_exactly_once(
    shard_sizes, batch_size, world_size, epochs, workers, data
):
    size = sum(shard_sizes)
    wanted = epochs * size
    start = data.draw(st.integers(0, wanted - 1))
    batches = math.ceil((wanted - start) / (batch_size * world_size))
    seen = []
    for rank in range(world_size):
        mine = list(Positions(start, batch_size, rank, world_size, batches))
        assert len(mine) == batches
        for worker in range(max(1, workers)):  # what a DataLoader hands to each of its workers
            seen += [position for batch in mine[worker :: max(1, workers)] for position in batch]
    assert sorted(seen) == list(range(start, start + batches * batch_size * world_size))
    for epoch in range(epochs):
        read = [epoch_order(shard_sizes, 0, epoch, 2)[p % size] for p in seen if p // size == epoch]
        assert len(set(read)) == len(read) == max(0, min(size, (epoch + 1) * size - start))


@given(st.integers(1, 5), st.integers(0, 100))
def test_samples_stay_within_their_window_of_shards(window, seed):
    shard_sizes = [5] * 7
    order = epoch_order(shard_sizes, seed, 0, window)
    for first in range(0, 7, window):
        chunk = order[first * 5 : (first + window) * 5]
        assert len({int(i) // 5 for i in chunk}) == min(window, 7 - first)


def test_windows_are_shuffled_and_differ_by_epoch_and_seed():
    orders = [epoch_order([50, 50, 50], seed, epoch, 3).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != sorted(order) for order in orders)


def test_every_place_of_a_permutation_is_equally_likely():
    places = np.stack([epoch_order([8], 3, epoch, 1) for epoch in range(4000)])
    counts = np.stack([np.bincount(column, minlength=8) for column in places.T])
    chi_squared = ((counts - 500) ** 2 / 500).sum()  # 49 degrees of freedom
    assert chi_squared < 49 + 5 * math.sqrt(2 * 49)


def splitmix64_chain(*parts: int) -> int:
    state, mask = 0, 2**64 - 1
    for part in parts:
        state = ((state ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=4))
def test_hash_is_the_same_in_whole_numbers(parts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy warns where a scalar overflows
        assert hash64(*parts).tolist() == [splitmix64_chain(*parts)]


def test_hash_starts_as_splitmix64_does():
    # The first output of SplitMix64 seeded with 0, as published with its reference implementation.
    assert hash64(0).tolist() == [0xE220A8397B1DCDAF]


def test_uniform_numbers_are_uniform_and_streams_independent():
    samples = np.arange(20_000)
    dropout = uniform(0, Stream.DROPOUT, 0, samples)
    flip = uniform(0, Stream.FLIP, 0, samples)
    assert dropout.min() >= 0
    assert dropout.max() < 1
    counts = np.histogram(dropout, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 5 * math.sqrt(38)
    assert abs(np.corrcoef(dropout, flip)[0, 1]) < 5 / math.sqrt(20_000)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_order_does_not_depend_on_the_process(hash_seed):
    code = "from t2i.data.order import epoch_order; print(epoch_order([5, 6], 7, 8, 1).tolist())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(epoch_order([5, 6], 7, 8, 1).tolist())
