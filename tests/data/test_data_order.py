import math
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i.data.bucket_order import BucketOrder
from t2i.data.buckets import assign, bucket_shapes
from t2i.data.order import MixtureOrder, ShardOrder, Stream, hash64, uniform
from t2i.data.stream import CaptionedStream, Part, Positions

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)
seeds = st.integers(-5, 2**63)


def stream_of(*orders, weights=None, columns=4, unit=1) -> CaptionedStream:
    parts = [Part(str(i), SimpleNamespace(), order) for i, order in enumerate(orders)]
    return CaptionedStream(parts, weights or [1.0] * len(parts), 0, columns, unit)


def read(stream, start, stop, batch_size, world_size, workers) -> list[tuple[int, int, int]]:
    """(part, epoch, sample) of all that the workers of all ranks get, from `start` to `stop` or a little further."""
    batches = math.ceil((stop - start) / (batch_size * world_size))
    seen = []
    for rank in range(world_size):
        mine = list(Positions(stream, start, batch_size, rank, world_size, batches))
        assert len(mine) == batches  # the same for every rank
        assert all(len(slots.index) == batch_size for slots in mine)
        for worker in range(max(1, workers)):  # what a DataLoader hands to each of its workers
            for slots in mine[worker :: max(1, workers)]:
                seen += zip(slots.part.tolist(), slots.epoch.tolist(), slots.index.tolist(), strict=True)
    return seen


@given(sizes, seeds, st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_reads_every_sample_exactly_once(shard_sizes, seed, epoch, segments):
    order = ShardOrder(shard_sizes, seed, segments)
    size = len(order)
    epochs, samples = order.locate(np.arange(epoch * size, (epoch + 1) * size))
    assert set(epochs.tolist()) == {epoch}
    assert sorted(samples.tolist()) == list(range(sum(shard_sizes)))


@settings(deadline=None)
@given(
    sizes,
    seeds,
    st.integers(1, 9),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3)),
    st.integers(0, 20),
)
def test_stopped_and_resumed_otherwise_each_sample_of_each_epoch_is_read_exactly_once(
    shard_sizes, seed, segments, before, after, steps
):
    """before, after: batch per rank, ranks, workers; stopped after `steps` steps of the first run."""
    order = ShardOrder(shard_sizes, seed, segments)
    size = len(order)
    stop = steps * before[0] * before[1]
    first = read(stream_of(order), 0, stop, *before) if steps else []
    epochs = stop // size + 2
    then = read(stream_of(order), stop, epochs * size, *after)
    assert len(first) == stop
    for epoch in range(epochs):
        samples = [sample for _, of, sample in first + then if of == epoch]
        assert sorted(samples) == list(range(size))


@given(sizes, seeds, st.integers(1, 9), st.data())
def test_a_position_looked_up_alone_is_the_same(shard_sizes, seed, segments, data):
    order = ShardOrder(shard_sizes, seed, segments)
    position = data.draw(st.integers(0, 4 * len(order)))
    epochs, samples = order.locate(range(4 * len(order) + 1))
    epoch, sample = ShardOrder(shard_sizes, seed, segments).locate([position])
    assert (epoch.item(), sample.item()) == (epochs[position], samples[position])


def shards_of(order: ShardOrder, positions) -> np.ndarray:
    return np.searchsorted(order.starts, order.locate(positions)[1], side="right") - 1


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_shard_is_read_by_one_rank_from_end_to_end(world_size):
    order = ShardOrder([50] * 40, 3, 8)
    shards = shards_of(order, np.arange(2000))
    for rank in range(world_size):
        mine = shards[rank::world_size]
        others = np.delete(shards, np.s_[rank::world_size])
        assert not set(mine) & set(others)
    for segment in range(8):  # one shard after the other, each opened once
        changes = np.flatnonzero(np.diff(shards[segment::8]))
        assert len(changes) == 4
        assert len(set(shards[segment::8].tolist())) == 5
        assert [order.following(0, int(shards[segment::8][c])) for c in changes] == shards[segment::8][
            changes + 1
        ].tolist()


@given(sizes, seeds, st.integers(1, 9))
def test_each_lane_reads_one_shard_after_the_other(shard_sizes, seed, segments):
    order = ShardOrder(shard_sizes, seed, segments)
    shards = shards_of(order, np.arange(len(order)))
    opened = []
    for segment in range(order.segments):
        own = shards[segment :: order.segments]
        opened += own[np.flatnonzero(np.diff(own, prepend=-1))].tolist()
    assert len(opened) <= np.count_nonzero(shard_sizes) + order.segments - 1


def test_epochs_and_seeds_differ():
    order = {seed: ShardOrder([50] * 3, seed, 3) for seed in (0, 1)}
    orders = {
        tuple(order[seed].locate(np.arange(150 * epoch, 150 * (epoch + 1)))[1].tolist())
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(range(150)) not in orders


@pytest.mark.parametrize("shard_sizes", [[8], [2, 2, 2, 2]])
def test_every_place_of_a_permutation_is_equally_likely(shard_sizes):
    order = ShardOrder(shard_sizes, 3, 4)
    places = order.locate(np.arange(4000 * 8))[1].reshape(4000, 8)
    counts = np.stack([np.bincount(column, minlength=8) for column in places.T])
    chi_squared = ((counts - 500) ** 2 / 500).sum()  # 49 degrees of freedom
    assert chi_squared < 49 + 5 * math.sqrt(2 * 49)


def test_the_shuffle_is_as_good_as_the_docstring_says():
    """100 shards of 1,000; a full shuffle has neighbours 33,330 positions apart on average."""
    order = ShardOrder([1000] * 100, 0, 16)
    samples = order.locate(np.arange(100_000))[1]
    apart = np.abs(np.diff(np.argsort(samples)))[np.arange(99_999) % 1000 != 999]  # of neighbours in a file
    segment = np.argsort(samples) % 16
    uncut = np.repeat([len(set(part)) == 1 for part in segment.reshape(100, 1000).tolist()], 999)
    assert uncut.sum() == 88 * 999  # of 15 cuts 3 fall between two shards
    assert 5250 < apart[uncut].mean() < 5420
    assert 0.031 < (apart <= 256).mean() < 0.033
    classes = [len(set((batch // 1000).tolist())) for batch in samples[:99_840].reshape(-1, 256)]
    assert min(classes) == 16
    assert np.mean(classes) < 17


@given(sizes, seeds, st.integers(1, 9), st.data())
def test_substitutes_are_other_samples_of_the_same_lane(shard_sizes, seed, segments, data):
    order = ShardOrder(shard_sizes, seed, segments)
    position = data.draw(st.integers(0, 2 * len(order)))
    found = [slot for slot, _ in zip(order.substitutes(position), range(5), strict=False)]
    wanted = [position + order.segments * k for k in range(1, 6)]
    epochs, samples = order.locate(wanted)
    assert found == list(zip(epochs.tolist(), samples.tolist(), strict=True))[: len(found)]
    assert len(found) >= 1


@given(sizes, seeds, st.data())
def test_buckets_are_of_one_kind_and_lose_nothing(shard_sizes, seed, data):
    total, batch_size = sum(shard_sizes), data.draw(st.integers(1, 5))
    buckets = np.array(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)))
    order = BucketOrder(ShardOrder(shard_sizes, seed, 2), buckets, batch_size)
    assert len(order) % batch_size == 0
    assert len(order) - total < 4 * batch_size
    for epoch in range(2):
        epochs, samples = order.locate(np.arange(epoch * len(order), (epoch + 1) * len(order)))
        assert set(epochs.tolist()) == {epoch}
        assert all(len(set(batch.tolist())) == 1 for batch in buckets[samples].reshape(-1, batch_size))
        counts = np.bincount(samples, minlength=total)
        assert counts.min() >= 1
        # What fills up a last batch comes from its own bucket, and that batch alone.
        for bucket in set(buckets.tolist()):
            assert counts[buckets == bucket].sum() - (buckets == bucket).sum() < batch_size
    position = data.draw(st.integers(0, len(order) - 1))
    _, own = order.locate([position])
    assert {int(buckets[s]) for _, s in order.substitutes(position)} == {int(buckets[own[0]])}


@settings(deadline=None, max_examples=30)
@given(
    st.lists(sizes, min_size=2, max_size=3),
    st.data(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_a_mixture_reads_each_dataset_in_its_own_order_by_weight(
    parts, data, batch_size, world_size, columns
):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(parts), max_size=len(parts)))
    orders = [ShardOrder(shard_sizes, i, 2) for i, shard_sizes in enumerate(parts)]
    stream = stream_of(*orders, weights=[float(w) for w in weights], columns=columns)
    cycle = MixtureOrder.CYCLE * columns
    steps = math.ceil(cycle / (batch_size * world_size))
    seen = read(stream, 0, steps * batch_size * world_size, batch_size, world_size, 2)
    positions = np.arange(cycle)
    part, own = stream.mixture.locate(positions)
    for number, order in enumerate(orders):
        assert abs((part == number).sum() / cycle - weights[number] / sum(weights)) <= 1 / MixtureOrder.CYCLE
        assert sorted(own[part == number].tolist()) == list(
            range((part == number).sum())
        )  # each exactly once
        epochs = stream.epochs(cycle)[str(number)]
        assert epochs == (part == number).sum() / len(order)
        whole = int(epochs)
        for epoch in range(whole):
            samples = [s for p, e, s in seen if (p, e) == (number, epoch)]
            assert sorted(samples) == list(range(len(order)))


def test_even_the_smallest_weight_is_drawn():
    mixture = MixtureOrder([1.0, 1e-9], 0, 2)
    assert mixture.counts.tolist() == [999, 1]
    assert mixture.seen(2000).tolist() == [1998, 2]


def test_in_buckets_a_mixture_changes_parts_between_batches_only():
    orders = [BucketOrder(ShardOrder([30], i, 1), np.arange(30) % 2, 3) for i in range(2)]
    stream = stream_of(*orders, columns=2, unit=3)
    for rank in range(2):
        for slots in Positions(stream, 0, 3, rank, 2, 20):
            assert len(set(slots.part.tolist())) == 1
            assert len(set((slots.index % 2).tolist())) == 1


def test_bucket_shapes_are_sdxls():
    """Those of appendix I of 2307.01952, up to an aspect of 4, with the longest side for their height."""
    table = {
        (512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088),
        (1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1344, 768), (1472, 704), (1600, 640), (1792, 576),
        (2048, 512),
    }  # fmt: skip
    shapes = bucket_shapes(1024, 64, 4.0)
    assert shapes[0] == (1024, 1024)
    assert set(shapes) == table
    assert all(max(shape) <= 1.5 * min(shape) for shape in bucket_shapes(512, 64, 1.5))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_picture_goes_to_the_nearest_aspect_ratio(height, width):
    shapes = bucket_shapes(512, 64, 2.0)
    chosen, turned = assign(np.array([[height, width], [width, height]]), shapes).tolist()
    distances = [abs(math.log(height / width) - math.log(h / w)) for h, w in shapes]
    assert distances[chosen] == pytest.approx(min(distances))
    assert distances[chosen] == pytest.approx(
        abs(math.log(width / height) - math.log(shapes[turned][0] / shapes[turned][1]))
    )


def test_a_picture_of_unknown_size_goes_to_the_square():
    shapes = bucket_shapes(512, 64, 2.0)
    assert [shapes[i] for i in assign(np.array([[0, 0], [0, 900]]), shapes)] == [(512, 512)] * 2


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
    code = (
        "from t2i.data.order import ShardOrder; print(ShardOrder([5, 6], 7, 2).locate(range(30))[1].tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(ShardOrder([5, 6], 7, 2).locate(range(30))[1].tolist())
