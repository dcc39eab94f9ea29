"""Batches of one shape are those of the plain definition, and take no look at all of an epoch."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from t2i.data import bucket_order
from t2i.data.bucket_order import BucketOrder
from t2i.data.order import ShardOrder


def plain(order: ShardOrder, buckets: np.ndarray, batch_size: int, epoch: int) -> np.ndarray:
    """All samples of an epoch by the definition: each goes into its bucket, a full one is the next batch; what is left
    at the end is filled up from the beginning."""
    size = len(order)
    samples = order.locate(np.arange(epoch * size, (epoch + 1) * size))[1]
    batches, full_at = [], []
    for bucket in np.unique(buckets):
        places = np.flatnonzero(buckets[samples] == bucket)
        missing = -len(places) % batch_size
        filled = np.concatenate([places, np.resize(places, missing)]).reshape(-1, batch_size)
        batches.append(samples[filled])
        full_at.append(filled.max(axis=1))
    return np.concatenate(batches)[np.argsort(np.concatenate(full_at), kind="stable")].ravel()


@pytest.fixture(params=[7, 64, 2**20])
def piece(request, monkeypatch):
    monkeypatch.setattr(bucket_order, "PIECE", request.param)


@pytest.mark.parametrize("segments", [1, 3, 16])
@pytest.mark.parametrize("largest", [1, 2, 40])
def test_batches_are_those_of_the_definition(piece, segments, largest):
    random = np.random.default_rng(segments * largest)
    sizes = random.integers(0, largest + 1, 60)
    shards = ShardOrder(sizes, 3, segments)
    # One bucket has none, one has one sample, one has most.
    buckets = random.choice([0, 1, 2, 5], len(shards), p=[0.7, 0.2, 0.1, 0.0]).astype(np.int16)
    buckets[0] = 4
    order = BucketOrder(shards, buckets, 8)
    for epoch in range(3):
        wanted = plain(shards, buckets, 8, epoch)
        assert len(order) == len(wanted)
        epochs, samples = order.locate(np.arange(epoch * len(wanted), (epoch + 1) * len(wanted)))
        assert samples.tolist() == wanted.tolist()
        assert set(epochs.tolist()) == {epoch}
    mixed = random.integers(0, 3 * len(order), 50)  # in any order, of several epochs
    wanted = np.concatenate([plain(shards, buckets, 8, epoch) for epoch in range(3)])
    assert order.locate(mixed)[1].tolist() == wanted[mixed].tolist()
    again = pickle.loads(pickle.dumps(order))
    assert again.locate(mixed)[1].tolist() == wanted[mixed].tolist()


def test_substitutes_are_the_rest_of_the_bucket_in_a_circle(piece):
    random = np.random.default_rng(0)
    shards = ShardOrder(random.integers(0, 9, 30), 3, 4)
    buckets = random.integers(0, 3, len(shards)).astype(np.int16)
    order = BucketOrder(shards, buckets, 8)
    samples = plain(shards, buckets, 8, 1)
    for offset in (0, 5, len(order) // 2, len(order) - 1):
        alike = np.flatnonzero(buckets[samples] == buckets[samples[offset]])
        wanted = samples[np.roll(alike, -int(np.searchsorted(alike, offset, side="right")))]
        assert list(order.substitutes(len(order) + offset)) == [(1, sample) for sample in wanted.tolist()]


def test_a_few_batches_look_up_a_small_part_of_an_epoch(monkeypatch):
    monkeypatch.setattr(bucket_order, "PIECE", 1000)
    shards = ShardOrder(np.full(1000, 100), 0, 16)
    looked_up = []
    locate = shards.locate
    monkeypatch.setattr(shards, "locate", lambda at: looked_up.append(len(at)) or locate(at))
    order = BucketOrder(shards, np.random.default_rng(0).integers(0, 5, 100_000).astype(np.int16), 32)
    order.locate(range(320))
    next(order.substitutes(len(order) // 2))
    assert sum(looked_up) <= 5000


def test_samples_before_a_position_are_counted_by_shards():
    random = np.random.default_rng(0)
    shards = ShardOrder(random.integers(0, 30, 50), 1, 7)
    labels = random.integers(0, 4, len(shards))
    of_shards = shards.label_counts(labels, 4)
    assert of_shards.sum(axis=1).tolist() == shards.sizes.tolist()
    positions = np.array([0, 1, 6, 7, 100, len(shards) // 2, len(shards) - 1, len(shards)])
    in_order = labels[shards.locate(np.arange(2 * len(shards), 3 * len(shards)))[1]]
    wanted = [np.bincount(in_order[:position], minlength=4).tolist() for position in positions]
    assert shards.counts_before(2, positions, labels, of_shards).tolist() == wanted
