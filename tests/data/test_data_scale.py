"""The order of samples for as many ranks and shards as the largest runs have."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np

from t2i.data.order import ShardOrder
from t2i.data.stream import Positions

SHARDS, SEGMENTS = 200_000, 16


def test_2048_ranks_then_1536_see_each_sample_of_an_epoch_once():
    """In batches of 4 each, over shards of 5 to 15 samples; the change comes in the middle of the epoch."""
    sizes = np.random.default_rng(0).integers(5, 16, SHARDS)
    order = ShardOrder(sizes, seed=0, segments=SEGMENTS)
    stream: Any = SimpleNamespace(unit=1)
    start, seen = 0, np.zeros(len(order), dtype=np.int64)
    for world, until in ((2048, len(order) // 2), (1536, len(order))):
        steps = -(-(until - start) // (4 * world))
        at = np.stack(
            [Positions(stream, start, 4, rank, world, steps).positions(0, steps) for rank in range(world)]
        )
        of_all = np.sort(at.ravel())
        assert np.array_equal(
            of_all, np.arange(start, start + len(of_all))
        )  # no position twice, none left out
        for first, stop in itertools.pairwise([*range(0, len(of_all), 2**16), len(of_all)]):
            epochs, samples = order.locate(of_all[first:stop])
            np.add.at(seen, samples[epochs == 0], 1)
        start += len(of_all)
    assert (seen == 1).all()


def test_a_rank_finds_its_place_without_the_ranks_before_it():
    """Whatever it has located before, a rank of 2,048 finds the same samples."""
    sizes = np.random.default_rng(1).integers(5, 16, SHARDS)
    positions = 1_000_000 + np.arange(64) * 2048 + 1234
    whole = ShardOrder(sizes, seed=3, segments=SEGMENTS)
    whole.locate(np.arange(0, 1_000_000, 997))
    for found, fresh in zip(
        whole.locate(positions), ShardOrder(sizes, seed=3, segments=SEGMENTS).locate(positions), strict=True
    ):
        assert np.array_equal(found, fresh)
