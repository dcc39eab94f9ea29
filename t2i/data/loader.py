"""Batches of captioned pictures: shards -> order -> decode -> batch."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i.config import DataConfig
from t2i.data.captions import choose_caption
from t2i.data.decode import BadSample
from t2i.data.order import Stream, epoch_order, uniform
from t2i.data.reader import Sample, SampleReader, as_pair, build_reader, causes, collate
from t2i.errors import DataError
from t2i.interfaces import Batch

log = logging.getLogger(__name__)

MIN_READS_TO_JUDGE = 100  # before that a share of bad samples says little
EPOCHS_KEPT = 2  # a batch may straddle two


class CaptionedImages(Dataset):
    """A map from positions of the endless stream of epochs (see `t2i.data.order`) to batches.

    A bad sample leaves its seat to the next good sample in the epoch's order (past the epoch's end, from
    its start), so that batches keep their shape and a position's content depends on nothing but (seed,
    position). That good sample is seen twice in such an epoch. Bad samples are logged once per process and
    counted by cause in `Batch.bad`; where they exceed `data.max_bad_share` of what this process has read,
    reading stops with a DataError.
    """

    def __init__(
        self,
        data: DataConfig,
        reader: SampleReader,
        *,
        text_dropout: float,
        seed: int,
    ) -> None:
        self.data = data
        self.reader = reader
        self.text_dropout = text_dropout
        self.seed = seed
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._reads = 0
        self._bad: Counter[str] = Counter()
        self._logged: set[str] = set()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.reader)

    def order(self, epoch: int) -> np.ndarray:
        """(N,) int64: `epoch_order` of this dataset; the latest are kept."""
        if epoch not in self._orders:
            sizes, window = self.reader.shard_sizes, self.data.shuffle_window_shards
            self._orders[epoch] = epoch_order(sizes, self.seed, epoch, window)
            while len(self._orders) > EPOCHS_KEPT:
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def __getitems__(self, positions: Sequence[int]) -> Batch | DataError:
        """The batch at `positions`. A DataError is returned, not raised: raised, it would reach the training
        process wrapped in the traceback of a worker (see `BatchLoader`)."""
        failed: dict[tuple[int, int], str] = {}
        try:
            seats = [self._fill_seat(position, failed) for position in positions]
        except DataError as error:
            return error
        epochs = np.array([epoch for epoch, _, _ in seats])
        indices = np.array([index for _, index, _ in seats])
        samples = [sample for _, _, sample in seats]
        chances = uniform(self.seed, Stream.DROPOUT, epochs, indices).tolist()
        choices = uniform(self.seed, Stream.CAPTION, epochs, indices).tolist()
        batch = collate(
            samples,
            captions=[
                choose_caption(sample.captions, choice, chance, self.text_dropout)
                for sample, choice, chance in zip(samples, choices, chances, strict=True)
            ],
            bad=dict(Counter(failed.values())),
        )
        if self.data.horizontal_flip:
            flipped = torch.from_numpy(uniform(self.seed, Stream.FLIP, epochs, indices) < 0.5)
            batch.image[flipped] = batch.image[flipped].flip(-1)
        return batch

    def _fill_seat(self, position: int, failed: dict[tuple[int, int], str]) -> tuple[int, int, Sample]:
        """(epoch, sample index, sample) for one position; `failed` gathers what this batch found bad."""
        size = len(self)
        epoch, offset = divmod(position, size)
        order = self.order(epoch)
        for step in range(size):
            index = int(order[(offset + step) % size])
            if (epoch, index) in failed:
                continue
            try:
                sample = self.reader.read(index, self._place(epoch, index))
            except BadSample as error:
                failed[epoch, index] = error.cause
                self._count_bad(error)
            else:
                self._reads += 1
                return epoch, index, sample
        raise DataError(f"data.shards: none of {size} samples can be read ({causes(self._bad)}).")

    def _place(self, epoch: int, index: int) -> tuple[float, float] | None:
        if self.data.crop == "center":
            return None
        top, left = (uniform(self.seed, s, epoch, index).item() for s in (Stream.CROP_TOP, Stream.CROP_LEFT))
        return top, left

    def _count_bad(self, error: BadSample) -> None:
        self._reads += 1
        self._bad[error.cause] += 1
        if error.key not in self._logged:
            self._logged.add(error.key)
            log.warning("skipped %s", error)
        bad, allowed = self._bad.total(), self.data.max_bad_share
        if self._reads >= MIN_READS_TO_JUDGE and bad > allowed * self._reads:
            raise DataError(
                f"data.shards: {bad} of the {self._reads} samples read are bad ({causes(self._bad)}); "
                f"allowed: a share of data.max_bad_share={allowed:g}."
            )


class Positions:
    """A rank's batches of positions, in order; the batch sampler of a DataLoader, which keeps that order
    for any number of workers.

    start: global position of the first batch
    batches: how many there are; None: no end
    """

    def __init__(self, start: int, batch_size: int, rank: int, world_size: int, batches: int | None) -> None:
        self.start, self.batch_size, self.rank, self.world_size = start, batch_size, rank, world_size
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        k = 0
        while self.batches is None or k < self.batches:
            first = self.start + (k * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            k += 1

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("an endless stream has no length")
        return self.batches


class BatchLoader(DataLoader):
    """A DataLoader that raises the DataError a worker hands over in the place of a batch."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def build_loader(
    data: DataConfig,
    *,
    size_px: int | tuple[int, int],
    batch_size: int,
    text_dropout: float,
    min_original_px: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start_images: int = 0,
    num_images: int | None = None,
) -> BatchLoader:
    """Batches of `data.shards` from the position `start_images` on.

    size_px: (H, W), or the side of a square
    batch_size: per rank
    text_dropout: probability that a caption is replaced by ""
    min_original_px: shortest original side allowed, where `data.filter_by_size`
    start_images: images seen so far by all ranks together
    num_images: images still to see by all ranks together, rounded up to whole batches; None: no end
    Batches do not depend on data.num_workers; those of R ranks with batch B, concatenated, are those of one
    rank with batch RB. `data.cache_mib` serves centred crops only, and each worker has a cache of its own.
    Raises DataError.
    """
    reader = build_reader(data, as_pair(size_px), min_original_px if data.filter_by_size else 0)
    if data.cache_mib and data.crop == "random":
        log.warning("data.cache_mib has no effect where data.crop is random")
    global_batch = batch_size * world_size
    batches = None if num_images is None else -(-num_images // global_batch)
    return BatchLoader(
        CaptionedImages(data, reader, text_dropout=text_dropout, seed=seed),
        batch_sampler=Positions(start_images, batch_size, rank, world_size, batches),
        num_workers=data.num_workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
    )


def _as_is(batch: Any) -> Any:
    return batch
