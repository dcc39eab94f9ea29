"""One endless stream of slots over one or several datasets, and each rank's share of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from t2i.data.bucket_order import BucketOrder
from t2i.data.fingerprint import contents
from t2i.data.order import MixtureOrder, Order, ShardOrder
from t2i.data.reader import SampleReader
from t2i.data_config import DataConfig
from t2i.errors import DataError

BATCHES_LOCATED = 128  # at a time: looking up many positions costs little more than one


@dataclass(frozen=True)
class Part:
    """One dataset of the mixture: name ("" where it is the only one), how it is read, and in which order."""

    name: str
    reader: SampleReader
    order: Order


@dataclass(frozen=True)
class Slots:
    """What stands at the positions of one batch, (B,) int64 each.

    position: in the endless stream of all parts
    part: number of the dataset; own: position in the dataset's own stream; epoch, index: of it, the epoch and sample
    """

    position: np.ndarray
    part: np.ndarray
    own: np.ndarray
    epoch: np.ndarray
    index: np.ndarray


class CaptionedStream:
    """Which sample stands at which position of the endless stream: the order of the parts, mixed by weight.

    unit: so many positions, counted from 0, have one shape and go to one rank together
    """

    def __init__(self, parts: list[Part], weights: list[float], seed: int, columns: int, unit: int) -> None:
        self.parts, self.unit = parts, unit
        self.mixture = MixtureOrder(weights, seed, columns, unit) if len(parts) > 1 else None

    def locate(self, positions: np.ndarray) -> Slots:
        part, own = np.zeros_like(positions), positions
        if self.mixture is not None:
            part, own = self.mixture.locate(positions)
        epoch, index = np.empty_like(own), np.empty_like(own)
        for number in np.unique(part).tolist():
            here = part == number
            epoch[here], index[here] = self.parts[number].order.locate(own[here])
        return Slots(positions, part, own, epoch, index)

    def fingerprint(self) -> str:
        """A digest of the sizes of all shards, on which the order depends, and of what tells local shards apart (see
        `contents`)."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(np.ascontiguousarray(part.reader.shards.sizes, dtype=np.int64).tobytes())
            digest.update(contents([each.url for each in part.reader.shards.listed]))
            if part.reader.buckets is not None:
                digest.update(part.reader.buckets.tobytes())
        return digest.hexdigest()

    def epochs(self, images: int) -> dict[str, float]:
        """How many epochs of each part the first `images` positions are, by its name."""
        seen = [images] if self.mixture is None else self.mixture.seen(images).tolist()
        return {part.name: count / len(part.order) for part, count in zip(self.parts, seen, strict=True)}


class Positions:
    """A rank's batches of slots, in order; the batch sampler of a DataLoader, which keeps that order for any number of
    workers.

    start: global position of the first batch
    batches: how many there are; None: no end
    """

    def __init__(
        self,
        stream: CaptionedStream,
        start: int,
        batch_size: int,
        rank: int,
        world_size: int,
        batches: int | None,
    ) -> None:
        self.stream, self.start, self.batch_size = stream, start, batch_size
        self.rank, self.world_size, self.batches = rank, world_size, batches

    def __iter__(self) -> Iterator[Slots]:
        done = 0
        while self.batches is None or done < self.batches:
            count = BATCHES_LOCATED if self.batches is None else min(BATCHES_LOCATED, self.batches - done)
            at = self.stream.locate(self.positions(done, count).ravel())
            for i in range(0, count * self.batch_size, self.batch_size):
                here = slice(i, i + self.batch_size)
                yield Slots(at.position[here], at.part[here], at.own[here], at.epoch[here], at.index[here])
            done += count

    def positions(self, first: int, count: int) -> np.ndarray:
        """(count, batch_size) int64: of the steps `first` and on, the positions of this rank. Of the units of the
        stream it takes every world_size-th."""
        unit, world = self.stream.unit, self.world_size
        units = np.arange(self.batch_size // unit) * world + self.rank
        within = (units[:, None] * unit + np.arange(unit)).ravel()
        steps = first + np.arange(count)
        return self.start + steps[:, None] * self.batch_size * world + within

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("an endless stream has no length")
        return self.batches


def build_stream(
    data: DataConfig, size_px: tuple[int, int], batch_size: int, min_original_px: int, seed: int
) -> CaptionedStream:
    """Opens the datasets of `data`. Raises DataError."""
    segments, parts, weights = data.shuffle_window_shards, [], []
    for number, (key, own) in enumerate(data.parts().items()):
        name = key.removeprefix("data.mixture.") if data.mixture else ""
        part = data.mixture.get(name)
        minimum = min_original_px if part is None or part.min_original_px is None else part.min_original_px
        reader = SampleReader(own, size_px, minimum if data.filter_by_size else 0, key, allow_pipes=True)
        # Parts of one size would otherwise be read in step.
        order: Order = ShardOrder(reader.shards.sizes, seed + number, segments)
        if reader.buckets is not None:
            order = BucketOrder(
                ShardOrder(reader.shards.sizes, seed + number, segments), reader.buckets, batch_size
            )
        parts.append(Part(name, reader, order))
        weights.append(1.0 if part is None else part.weight)
    if len({frozenset(p.reader.encoded.record.features if p.reader.encoded else ()) for p in parts}) > 1:
        raise DataError("data.mixture: all parts have the same features in `encoded`, or none has any.")
    return CaptionedStream(parts, weights, seed, segments, 1 if data.bucket_step_px is None else batch_size)
