"""The order of batches of one shape each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from t2i.data.order import ShardOrder

PIECE = 2**20
PIECES_KEPT = 4  # of 24 bytes a position


@dataclass(frozen=True)
class _Piece:
    """Positions of an epoch that follow one another.

    samples: (n,) grouped by bucket, in the order of the epoch within each
    begins: (K + 1,) of each bucket in `samples`
    full_at: (m, 2) the bucket of each batch that is full here and its number among those of the bucket, in order
    """

    samples: np.ndarray
    begins: np.ndarray
    full_at: np.ndarray


class BucketOrder:
    """A stream in which every `batch_size` positions, counted from 0, are of one bucket.

    The samples of an epoch go by in the order of `order`, each into its bucket; a bucket that is full is the next
    batch. What is left in a bucket at the end of the epoch is filled up with the bucket's first samples of that
    epoch, which are then seen twice in it; so every epoch has the same number of batches. The order of
    batches does not depend on ranks or workers, but on the size of a batch. Batches are made across all segments, so
    that every node reads every shard.

    How many samples of each bucket come before every PIECE-th position is known from those of whole shards; what lies
    between is looked up when it is asked for. So an epoch takes memory and time for its shards, not for its samples.

    buckets: (N,) the bucket of each sample
    """

    def __init__(self, order: ShardOrder, buckets: np.ndarray, batch_size: int) -> None:
        self.order, self.buckets, self.batch_size = order, buckets, batch_size
        self._of_shards = order.label_counts(buckets, int(buckets.max(initial=-1)) + 1)
        self._totals = self._of_shards.sum(axis=0, dtype=np.int64)
        self._batches = -(-self._totals // batch_size)  # of each bucket
        self._size = int(self._batches.sum()) * batch_size
        self._before = lru_cache(maxsize=2)(self._counted)
        self._pieces = lru_cache(maxsize=PIECES_KEPT)(self._looked_up)

    def __reduce__(self) -> tuple[type[BucketOrder], tuple[ShardOrder, np.ndarray, int]]:
        return BucketOrder, (self.order, self.buckets, self.batch_size)

    def __len__(self) -> int:
        """Positions in an epoch: what fills up included."""
        return self._size

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Order`."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        batches, within = np.divmod(offsets, self.batch_size)
        samples = np.empty_like(offsets)
        a_batch = epochs * (len(self) // self.batch_size) + batches
        in_order = np.argsort(a_batch, kind="stable")
        edges = np.flatnonzero(np.diff(a_batch[in_order])) + 1
        for here in np.split(in_order, edges):
            if len(here):
                epoch = int(epochs[here[0]])
                samples[here] = self._batch(epoch, *self._full(epoch, int(batches[here[0]])))[within[here]]
        return epochs, samples

    def substitutes(self, position: int) -> Iterator[tuple[int, int]]:
        """What comes next in the same bucket of the same epoch, then what came before."""
        epoch, offset = divmod(position, len(self))
        batch, within = divmod(offset, self.batch_size)
        bucket, number = self._full(epoch, batch)
        count = int(self._batches[bucket])
        yield from ((epoch, sample) for sample in self._batch(epoch, bucket, number)[within + 1 :].tolist())
        for other in (*range(number + 1, count), *range(number)):
            yield from ((epoch, sample) for sample in self._batch(epoch, bucket, other).tolist())
        yield from ((epoch, sample) for sample in self._batch(epoch, bucket, number)[: within + 1].tolist())

    def following(self, epoch: int, shard: int) -> int | None:
        """See `Order`."""
        return self.order.following(epoch, shard)

    def _full(self, epoch: int, batch: int) -> tuple[int, int]:
        """The bucket that makes a batch of an epoch, and which of its batches that is."""
        before = self._before(epoch)
        full = before // self.batch_size + ((before == self._totals) & (self._totals % self.batch_size > 0))
        full_before = full.sum(axis=1)
        piece = int(np.searchsorted(full_before, batch, side="right")) - 1
        bucket, number = self._pieces(epoch, piece).full_at[batch - full_before[piece]].tolist()
        return bucket, number

    def _batch(self, epoch: int, bucket: int, number: int) -> np.ndarray:
        """(batch_size,) samples."""
        first, total = number * self.batch_size, int(self._totals[bucket])
        stop = min(first + self.batch_size, total)
        found = self._of_bucket(epoch, bucket, first, stop)
        missing = self.batch_size - len(found)
        if missing:
            start = found if not first else self._of_bucket(epoch, bucket, 0, min(missing, total))
            found = np.concatenate([found, np.resize(start, missing)])
        return found

    def _of_bucket(self, epoch: int, bucket: int, first: int, stop: int) -> np.ndarray:
        """The samples of a bucket from the `first` to before the `stop`-th of an epoch."""
        before = self._before(epoch)[:, bucket]
        found = []
        piece = int(np.searchsorted(before, first, side="right")) - 1
        while first < stop:
            pieces = self._pieces(epoch, piece)
            here = pieces.samples[pieces.begins[bucket] : pieces.begins[bucket + 1]]
            taken = here[first - before[piece] : stop - before[piece]]
            found.append(taken)
            first, piece = first + len(taken), piece + 1
        return np.concatenate(found)

    def _looked_up(self, epoch: int, piece: int) -> _Piece:
        size, before = len(self.order), self._before(epoch)[piece]
        start, stop = piece * PIECE, min((piece + 1) * PIECE, size)
        samples = self.order.locate(np.arange(epoch * size + start, epoch * size + stop))[1]
        buckets = self.buckets[samples]
        grouped = np.argsort(buckets, kind="stable")
        begins = np.searchsorted(buckets[grouped], np.arange(len(self._totals) + 1))
        sorted_buckets = buckets[grouped].astype(np.int64)
        nth = (
            before[sorted_buckets] + np.arange(len(grouped)) - begins[sorted_buckets]
        )  # of the bucket, in the epoch
        full = ((nth + 1) % self.batch_size == 0) | (nth + 1 == self._totals[sorted_buckets])
        in_order = np.argsort(grouped[full], kind="stable")
        full_at = np.stack([sorted_buckets[full], nth[full] // self.batch_size], axis=1)[in_order]
        return _Piece(samples[grouped], begins, full_at)

    def _counted(self, epoch: int) -> np.ndarray:
        """(pieces + 1, K) how many samples of each bucket come before each piece of an epoch."""
        edges = np.append(np.arange(0, len(self.order), PIECE), len(self.order))
        return self.order.counts_before(epoch, edges, self.buckets, self._of_shards)
