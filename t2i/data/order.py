"""Which sample stands at which position of the endless stream, and the randomness that goes with it.

Everything here is a pure function of integers. Epochs follow one another without a gap. Step k of a run takes the
positions [kG, (k+1)G) of the stream, G = batch_size * world_size, and rank r of R those p with p % R = r (in buckets,
where a batch has to be of one shape, every R-th run of batch_size positions). So one integer, images seen, is the whole
state of reading, whatever the number of ranks or workers before or after, and every rank gets as many batches as any
other: an epoch that does not divide by G goes on in the same batch with the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Protocol

import numpy as np

MIN_SUBSTITUTES = (
    100  # for a bad sample, where an epoch has fewer, so that the good ones of a few are found by chance
)


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


class Order(Protocol):
    """The endless stream of epochs over one dataset."""

    def __len__(self) -> int:
        """Positions in an epoch."""
        ...

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions of the stream -> (n,) epochs and (n,) global sample indices, int64."""
        ...

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """(epoch, sample index) of what may fill the slot at `position` if its own sample is bad, the best first: read
        from the shards that this rank reads anyway, and of the same shape. Ends after about an epoch."""
        ...

    def following(self, epoch: int, shard: int) -> int | None:
        """The shard that is opened when `shard` is read to its end; None where the epoch has no more of them."""
        ...


class ShardOrder:
    """The stream in which whole shards follow one another in a number of segments.

    An epoch permutes the shards, and the samples within each; that makes one long sequence, which is cut into
    `segments` segments of equal length (to one sample). Position p of the epoch is the next sample of segment p %
    segments. So `segments` shards are open at a time, and where the number of ranks divides `segments` (and the
    number of samples), rank r of R only ever reads the segments r, r + R, ...

    Is that shuffled enough? Every batch of G samples has G / segments from each of `segments` shards, at random
    places. Measured on 100 shards of 1,000 samples with segments=16 (tests/data/test_data_order.py): neighbours of a
    file stand on average 5,330 positions apart, in a shard that a cut goes through more, and 3.2% of them within 256
    of each other; after a full shuffle it is 33,330 and 0.5%. Where samples are sorted by shard, a batch of 256 holds
    16 classes of 100, after a full shuffle 92: shards that are alike inside want more segments.

    Is it sequential enough? A shard is asked for whole, and read to its end while `segments` of them are open, before
    the next one is opened; only the `segments` - 1 shards that a cut goes through are read in two parts, by two
    segments.

    Looking a position up takes the sizes of the shards and permutations of the open shards, never one of the epoch.

    shard_sizes: samples per shard; sample j of shard i has the global index sum(shard_sizes[:i]) + j
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int, segments: int) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed = seed
        self.segments = min(segments, len(self))
        self._shards = lru_cache(maxsize=2)(self._permuted_shards)  # a batch may straddle two epochs
        self._samples: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()  # by epoch and shard

    def __reduce__(self) -> tuple[type[ShardOrder], tuple[np.ndarray, int, int]]:
        return ShardOrder, (
            self.sizes,
            self.seed,
            self.segments,
        )  # the caches do not travel to another process

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self.starts[-1])

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        length, longer = divmod(len(self), self.segments)
        rounds, segments = np.divmod(offsets, self.segments)
        places = segments * length + np.minimum(segments, longer) + rounds  # in the sequence
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            shards, ends, _ = self._shards(epoch)
            chosen = np.flatnonzero(epochs == epoch)
            nth, asked = np.unique(np.searchsorted(ends, places[chosen], side="right"), return_inverse=True)
            here = shards[nth]
            permuted = np.concatenate(self._permuted_samples(epoch, here.tolist()))
            begins = np.cumsum(self.sizes[here]) - self.sizes[here]  # in `permuted`
            ranks = places[chosen] - (ends[nth] - self.sizes[here])[asked]
            samples[chosen] = self.starts[here][asked] + permuted[begins[asked] + ranks]
        return epochs, samples

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """What comes next in the same segment, and then, in the next epochs, in another."""
        stop = position + (max(len(self), MIN_SUBSTITUTES) + 1) * self.segments
        for first in range(position + self.segments, stop, 64 * self.segments):
            epochs, samples = self.locate(range(first, min(first + 64 * self.segments, stop), self.segments))
            yield from zip(epochs.tolist(), samples.tolist(), strict=True)

    def following(self, epoch: int, shard: int) -> int | None:
        """See `Order`."""
        shards, _, nth = self._shards(epoch)
        after = nth[shard] + 1
        return int(shards[after]) if after < len(shards) else None

    def counts_before(
        self, epoch: int, positions: np.ndarray, labels: np.ndarray, of_shards: np.ndarray
    ) -> np.ndarray:
        """(E, K) int64: of each label, how many samples come before each of these positions of an epoch.

        positions: (E,) from 0 to the length of an epoch, that included
        labels: (N,) of all samples, from 0 to K - 1; of_shards: (shards, K) how many samples of each label a shard has
        """
        shards, ends, _ = self._shards(epoch)
        whole = np.zeros((len(shards) + 1, of_shards.shape[1]), dtype=np.int64)
        np.cumsum(of_shards[shards], axis=0, out=whole[1:])
        length, longer = divmod(len(self), self.segments)
        segments = np.arange(self.segments)
        rounds, extra = np.divmod(positions[:, None], self.segments)
        starts = segments * length + np.minimum(segments, longer)  # in the sequence
        places, which = np.unique(
            np.concatenate([starts[None], starts + rounds + (segments < extra)]), return_inverse=True
        )
        nth = np.searchsorted(ends, places, side="right")
        found = whole[nth]
        part = np.flatnonzero(nth < len(shards))  # where a shard is cut in two
        for first in range(0, len(part), 64):
            cut = part[first : first + 64]
            here = shards[nth[cut]].tolist()
            once = list(dict.fromkeys(here))
            permuted = dict(zip(once, self._permuted_samples(epoch, once), strict=True))
            for at, shard in zip(cut.tolist(), here, strict=True):
                rank = int(places[at] - (ends[nth[at]] - self.sizes[shard]))
                seen = labels[self.starts[shard] + permuted[shard][:rank]]
                found[at] += np.bincount(seen, minlength=found.shape[1])
        before = found[which.reshape(len(positions) + 1, self.segments)]
        return (before[1:] - before[0]).sum(axis=1)

    def label_counts(self, labels: np.ndarray, count: int) -> np.ndarray:
        """(shards, K) int32: how many samples of each of the `count` labels a shard has."""
        found = np.zeros((len(self.sizes), count), dtype=np.int32)
        for start in range(0, len(self), 2**20):
            stop = min(start + 2**20, len(self))
            shard = np.searchsorted(self.starts, np.arange(start, stop), side="right") - 1
            first, last = int(shard[0]), int(shard[-1])
            bins = (shard - first) * count + labels[start:stop]
            added = np.bincount(bins, minlength=(last - first + 1) * count)
            found[first : last + 1] += added.reshape(-1, count).astype(np.int32)
        return found

    def _permuted_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shards that are not empty, in the epoch's order; the running sum of their sizes; and of every shard its
        place in that order."""
        bits = hash64(self.seed, int(Stream.SHARDS), epoch, np.arange(len(self.sizes)))
        shards = np.argsort(bits, kind="stable")
        shards = shards[self.sizes[shards] > 0]
        nth = np.full(len(self.sizes), -1)
        nth[shards] = np.arange(len(shards))
        return shards, np.cumsum(self.sizes[shards]), nth

    def _permuted_samples(self, epoch: int, shards: Sequence[int]) -> list[np.ndarray]:
        """The order of the samples within each of these shards."""
        missing = [shard for shard in shards if (epoch, shard) not in self._samples]
        sizes = self.sizes[missing]
        begins = np.cumsum(sizes) - sizes
        of = np.repeat(np.arange(len(missing)), sizes)
        within = np.arange(len(of)) - begins[of]
        # The bits belong to the sample, so that ties (1 in 2^64) are broken by shard order and nothing else.
        bits = hash64(self.seed, int(Stream.SAMPLES), epoch, self.starts[missing][of] + within)
        permuted = within[np.lexsort((bits, of))]
        made = dict(zip(missing, np.split(permuted, begins[1:]), strict=True)) if missing else {}
        found = [made[shard] if shard in made else self._samples[epoch, shard] for shard in shards]
        for shard, order in list(zip(shards, found, strict=True))[-4 * self.segments :]:
            # Copied: a piece would hold on to all that was made with it.
            self._samples[epoch, shard] = order if shard not in made else order.copy()
            self._samples.move_to_end((epoch, shard))
        while len(self._samples) > 4 * self.segments:
            self._samples.popitem(last=False)
        return found


class MixtureOrder:
    """Which of several datasets fills each position of the stream, and with which of its own positions.

    Runs of `unit` positions belong together; run u belongs to column u % columns. Each column draws datasets by weight,
    exactly so in every CYCLE of its runs; a dataset's own stream is spread over the columns in the same way, so that
    each of its positions comes exactly once, and stays with the ranks that read it where their number divides
    `columns`.

    weights: of each dataset, positive, of any sum; kept to 1 / CYCLE, and at least that
    """

    CYCLE = 1000

    def __init__(self, weights: Sequence[float], seed: int, columns: int, unit: int = 1) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * self.CYCLE
        counts = np.floor(shares).astype(np.int64)
        counts[np.argsort(counts - shares, kind="stable")[: self.CYCLE - counts.sum()]] += 1
        while not counts.all():
            counts[np.argmin(counts)] += 1
            counts[np.argmax(counts)] -= 1
        self.counts, self.seed, self.columns, self.unit = counts, seed, columns, unit
        self._labels = np.repeat(np.arange(len(counts)), counts)
        self._cycle = lru_cache(maxsize=2 * columns)(self._drawn)
        self._made_of = list(weights), seed, columns, unit

    def __reduce__(self) -> tuple[type[MixtureOrder], tuple[list[float], int, int, int]]:
        return MixtureOrder, self._made_of

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions -> (n,) datasets and (n,) positions in their own streams, int64."""
        runs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.unit)
        rounds, column = np.divmod(runs, self.columns)
        cycles, place = np.divmod(rounds, self.CYCLE)
        drawn = [self._cycle(*at) for at in zip(cycles.tolist(), column.tolist(), strict=True)]
        datasets = np.array([labels[i] for (labels, _), i in zip(drawn, place, strict=True)], dtype=np.int64)
        before = np.array([ranks[i] for (_, ranks), i in zip(drawn, place, strict=True)], dtype=np.int64)
        own_runs = (cycles * self.counts[datasets] + before) * self.columns + column
        return datasets, own_runs * self.unit + within

    def seen(self, positions: int) -> np.ndarray:
        """(D,) int64: how many of the first `positions` each dataset filled, in whole runs."""
        rounds, extra = divmod(positions // self.unit, self.columns)
        cycles, place = divmod(rounds, self.CYCLE)
        seen = cycles * self.columns * self.counts
        for column in range(self.columns):
            labels, _ = self._cycle(cycles, column)
            upto = place + (column < extra)
            seen = seen + np.bincount(labels[:upto], minlength=len(self.counts))
        return seen * self.unit

    def _drawn(self, cycle: int, column: int) -> tuple[np.ndarray, np.ndarray]:
        """(CYCLE,) the datasets of one cycle of a column, and how often each came in it before."""
        bits = hash64(self.seed, int(Stream.MIXTURE), cycle, column, np.arange(self.CYCLE))
        labels = self._labels[np.argsort(bits, kind="stable")]
        ranks = np.empty_like(labels)
        for dataset in range(len(self.counts)):
            ranks[labels == dataset] = np.arange(self.counts[dataset])
        return labels, ranks
