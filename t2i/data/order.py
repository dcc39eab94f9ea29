"""Which sample stands at which position of the endless stream, and the randomness that goes with it.

Everything here is a pure function of integers. Epochs follow one another without a gap. Batch k of a run takes
the positions [kG, (k+1)G) of the stream, G = batch_size * world_size, and rank r of R those of them with
p % R = r. So one integer, images seen, is the whole state of reading, whatever the number of ranks or workers
before or after, and every rank gets as many batches as any other.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np


class Stream(IntEnum):
    """What a random number is for; streams are independent of one another."""

    SHARDS = 0
    SAMPLES = 1
    DROPOUT = 2
    CAPTION = 3
    CROP_TOP = 4
    CROP_LEFT = 5
    FLIP = 6
    MIXTURE = 7


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """Counter-based random bits: integers (arrays broadcast) -> uint64 of at least one dimension.

    SplitMix64's finaliser (Steele, Lea & Flood 2014) chained over `parts`. Our own lines rather than a numpy
    Generator, because numpy may change the streams of Generator methods between versions, and a resumed run
    must not notice.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        if isinstance(part, int):
            part = np.array([part & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64)
        state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(seed: int, stream: Stream, epoch: int | np.ndarray, sample: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one for each (epoch, sample)."""
    return (hash64(seed, int(stream), epoch, sample) >> np.uint64(11)) * 2.0**-53


class ShardOrder:
    """The endless stream of epochs over some shards: which sample stands at which position.

    An epoch permutes the shards and deals them to `lanes` lanes, each shard to the lane that has the fewest
    samples yet. A lane reads its shards one after the other, the samples of each in a random order; the epoch takes
    one sample from each lane in turn (position p from lane p % lanes, until the shortest lane ends). So `lanes`
    shards are open at a time, each is read once from end to end before the next is opened, and where the number of
    ranks divides `lanes`, rank r of R only ever reads the lanes r, r + R, ... and no shard is fetched twice.

    Is that shuffled enough? Every batch of G samples has G / lanes from each of `lanes` shards, at random places.
    Measured on 100 shards of 1,000 samples, lanes=16 (`benchmarks/shuffle.py`): neighbours of a file stand on
    average 5,330 positions apart and 1.5% of them within 256 of each other; after a full shuffle it would be
    33,330 and 0.5%. Where samples are sorted by shard, a batch of 256 holds 16 classes of 100, after a full shuffle
    92: shards that are alike inside want more lanes.

    Looking a position up takes the sizes of the shards and permutations of the open shards, never one of the epoch.

    shard_sizes: samples per shard; sample j of shard i has the global index sum(shard_sizes[:i]) + j
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, lanes: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed = seed
        self.lanes = max(1, min(lanes, int((self.sizes > 0).sum())))
        self._epoch = lru_cache(maxsize=2)(self._deal)  # a batch may straddle two
        self._samples = lru_cache(maxsize=4 * self.lanes)(self._shuffled)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self.starts[-1])

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions of the stream -> (n,) epochs and (n,) global sample indices, int64."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            dealt, chosen = self._epoch(epoch), np.flatnonzero(epochs == epoch)
            shards, ranks = dealt.locate(offsets[chosen])
            for shard in np.unique(shards).tolist():
                within = shards == shard
                samples[chosen[within]] = self.starts[shard] + self._samples(epoch, shard)[ranks[within]]
        return epochs, samples

    def following(self, epoch: int, shard: int) -> int | None:
        """The shard that is read after `shard` in its lane; None where the epoch has no more of them."""
        return self._epoch(epoch).following.get(shard)

    def _deal(self, epoch: int) -> _Epoch:
        bits = hash64(self.seed, int(Stream.SHARDS), epoch, np.arange(len(self.sizes)))
        lanes: list[list[int]] = [[] for _ in range(self.lanes)]
        shortest = [(0, lane) for lane in range(self.lanes)]
        for shard in np.argsort(bits, kind="stable").tolist():
            if size := int(self.sizes[shard]):
                length, lane = heapq.heappop(shortest)
                lanes[lane].append(shard)
                heapq.heappush(shortest, (length + size, lane))
        return _Epoch.of(lanes, self.sizes)

    def _shuffled(self, epoch: int, shard: int) -> np.ndarray:
        size = int(self.sizes[shard])
        bits = hash64(self.seed, int(Stream.SAMPLES), epoch, int(self.starts[shard]) + np.arange(size))
        return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _Epoch:
    """The lanes of one epoch, the longest first.

    lanes: of each its shards; ends: of each the running sums of their sizes
    first, rounds: position and round from which on 1, 2, ... lanes fewer are left; following: see ShardOrder
    """

    lanes: list[np.ndarray]
    ends: list[np.ndarray]
    first: np.ndarray
    rounds: np.ndarray
    following: dict[int, int]

    @classmethod
    def of(cls, lanes: list[list[int]], sizes: np.ndarray) -> _Epoch:
        lanes = sorted(lanes, key=lambda lane: -int(sizes[lane].sum()))  # a stable sort
        ends = [np.cumsum(sizes[lane]) for lane in lanes]
        lengths = np.array([end[-1] for end in ends])[::-1]  # the shortest first
        rounds = np.concatenate([[0], lengths])
        alive = np.arange(len(lanes), 0, -1)
        first = np.concatenate([[0], np.cumsum(np.diff(rounds) * alive)])
        following = {a: b for lane in lanes for a, b in itertools.pairwise(lane)}
        return cls([np.array(lane) for lane in lanes], ends, first, rounds, following)

    def locate(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets within the epoch -> shards, and the how-manieth sample read of each."""
        ended = np.searchsorted(self.first, offsets, side="right") - 1
        since, alive = offsets - self.first[ended], len(self.lanes) - ended
        lane_of, round_of = since % alive, self.rounds[ended] + since // alive
        shards, ranks = np.empty_like(offsets), np.empty_like(offsets)
        for lane in np.unique(lane_of).tolist():
            chosen = lane_of == lane
            place = np.searchsorted(self.ends[lane], round_of[chosen], side="right")
            shards[chosen] = self.lanes[lane][place]
            before = np.concatenate([[0], self.ends[lane]])[place]
            ranks[chosen] = round_of[chosen] - before
        return shards, ranks


class MixtureOrder:
    """Which of several datasets fills each position of the stream, and with which of its own positions.

    Position p belongs to column p % columns. Each column draws datasets by weight, exactly so in every CYCLE of its
    positions; a dataset's own stream is spread over the columns in the same way, so that each of its positions
    comes exactly once, and stays with the ranks that read it where their number divides `columns`.

    weights: of each dataset, positive, of any sum; kept to 1 / CYCLE
    """

    CYCLE = 1000

    def __init__(self, weights: Sequence[float], seed: int, columns: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * self.CYCLE
        counts = np.floor(shares).astype(np.int64)
        counts[np.argsort(counts - shares, kind="stable")[: self.CYCLE - counts.sum()]] += 1
        self.counts, self.seed, self.columns = counts, seed, columns
        self._labels = np.repeat(np.arange(len(counts)), counts)
        self._cycle = lru_cache(maxsize=2 * columns)(self._drawn)

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions -> (n,) datasets and (n,) positions in their own streams, int64."""
        rounds, column = np.divmod(np.asarray(positions, dtype=np.int64), self.columns)
        cycles, place = np.divmod(rounds, self.CYCLE)
        drawn = [self._cycle(*at) for at in zip(cycles.tolist(), column.tolist(), strict=True)]
        datasets = np.array([labels[i] for (labels, _), i in zip(drawn, place, strict=True)], dtype=np.int64)
        before = np.array([ranks[i] for (_, ranks), i in zip(drawn, place, strict=True)], dtype=np.int64)
        return datasets, (cycles * self.counts[datasets] + before) * self.columns + column

    def seen(self, positions: int) -> np.ndarray:
        """(D,) int64: how many of the first `positions` each dataset filled."""
        rounds, extra = divmod(positions, self.columns)
        cycles, place = divmod(rounds, self.CYCLE)
        seen = cycles * self.columns * self.counts
        for column in range(self.columns):
            labels, _ = self._cycle(cycles, column)
            upto = place + (column < extra)
            seen = seen + np.bincount(labels[:upto], minlength=len(self.counts))
        return seen

    def _drawn(self, cycle: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """(CYCLE,) the datasets of one cycle of a column, and how often each came in it before."""
        bits = hash64(self.seed, int(Stream.MIXTURE), cycle, column, np.arange(self.CYCLE))
        labels = self._labels[np.argsort(bits, kind="stable")]
        ranks = np.empty_like(labels)
        for dataset in range(len(self.counts)):
            ranks[labels == dataset] = np.arange(self.counts[dataset])
        return labels, ranks


class BucketOrder:
    """A stream in which every `batch_size` positions, counted from 0, are of one bucket.

    The samples of an epoch go by in the order of `order`, each into its bucket; a bucket that is full is the next
    batch. What is left in a bucket at the end of the epoch is filled up with the bucket's first samples of that
    epoch, which are then seen twice in it; so every epoch has the same number of batches. The order of
    batches does not depend on ranks or workers, but on the size of a batch.

    buckets: (N,) the bucket of each sample. Takes a few arrays of N integers, unlike ShardOrder.
    """

    def __init__(self, order: ShardOrder, buckets: np.ndarray, batch_size: int) -> None:
        self.order, self.buckets, self.batch_size = order, buckets, batch_size
        self._batches = lru_cache(maxsize=2)(self._filled)
        self._size = int((-(-np.bincount(buckets) // batch_size)).sum()) * batch_size

    def __len__(self) -> int:
        """Positions in an epoch: what fills up included."""
        return self._size

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `ShardOrder.locate`."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            samples[chosen] = self._batches(epoch)[offsets[chosen]]
        return epochs, samples

    def following(self, epoch: int, shard: int) -> int | None:
        return self.order.following(epoch, shard)

    def _filled(self, epoch: int) -> np.ndarray:
        """(len(self),) global sample indices."""
        size = len(self.order)
        samples = self.order.locate(np.arange(epoch * size, (epoch + 1) * size))[1]
        batches, full_at = [], []
        for bucket in np.unique(self.buckets).tolist():
            places = np.flatnonzero(self.buckets[samples] == bucket)
            missing = -len(places) % self.batch_size
            filled = np.concatenate([places, np.resize(places, missing)]).reshape(-1, self.batch_size)
            batches.append(samples[filled])
            full_at.append(filled.max(axis=1))
        return np.concatenate(batches)[np.argsort(np.concatenate(full_at), kind="stable")].ravel()
