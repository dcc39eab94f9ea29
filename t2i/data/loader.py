"""Batches of captioned pictures: the stream of slots -> samples -> batches."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i.data.captions import choose_caption
from t2i.data.decode import BadSample
from t2i.data.order import Stream, uniform
from t2i.data.reader import Sample, Wanted, as_pair, causes, collate
from t2i.data.stream import CaptionedStream, Part, Positions, Slots, build_stream
from t2i.data_config import DataConfig
from t2i.errors import DataError
from t2i.few import FewOfEach, plural
from t2i.interfaces import Batch

log = logging.getLogger(__name__)

STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
MIN_READS_TO_JUDGE = 100  # before that a share of bad samples says little
MAX_TRIES = 1000  # samples that are decoded in vain to replace one bad one
MAX_DEADLINES = 10  # and how long that may take, as a multiple of data.deadline_s


class CaptionedImages(Dataset[Batch | DataError]):
    """A map from slots (see `Positions`) to batches.

    A bad sample leaves its slot to a good one (see `Order.substitutes`), so that batches keep their shape and a
    position's content depends on nothing but (seed, position); that good one is seen twice. A bad sample is counted, by
    cause, in the `Batch.bad` of its slot, so once an epoch; of each cause the first few are logged, once per process.
    Where bad ones exceed `data.max_bad_share` of what this process has read, reading stops with a DataError.
    """

    def __init__(self, data: DataConfig, stream: CaptionedStream, *, text_dropout: float, seed: int) -> None:
        self.data, self.stream, self.text_dropout, self.seed = data, stream, text_dropout, seed
        self._reads = 0
        self._bad: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # a key for each cause
        self._say = FewOfEach(log)
        self._read_from: dict[str, tuple[bytes, bytes]] = {}  # epochs and shards of the last batch of a part

    def __len__(self) -> int:
        """Positions in an epoch of all parts together."""
        return sum(len(part.order) for part in self.stream.parts)

    def __getitem__(self, slots: Slots) -> Batch | DataError:
        """The batch of `slots`. A DataError is returned, not raised: raised, it would reach the training
        process wrapped in the traceback of a worker (see `BatchLoader`)."""
        try:
            return self._batch(slots)
        except DataError as error:
            return error

    def _batch(self, slots: Slots) -> Batch:
        count = len(slots.index)
        samples: list[Sample | None] = [None] * count
        epochs, indices = slots.epoch.copy(), slots.index.copy()
        bad: Counter[str] = Counter()
        for number in np.unique(slots.part).tolist():
            here = np.flatnonzero(slots.part == number)
            part = self.stream.parts[number]
            self._prefetch(part, epochs[here], indices[here])
            wanted = [
                self._wanted(part, *at)
                for at in zip(epochs[here].tolist(), indices[here].tolist(), strict=True)
            ]
            for slot, answer in zip(here.tolist(), part.reader.read(wanted), strict=True):
                self._reads += 1
                if isinstance(answer, BadSample):
                    bad[answer.cause] += 1
                    self._count_bad(part, answer)
                else:
                    samples[slot] = answer
        for slot in range(count):
            if samples[slot] is None:
                part = self.stream.parts[int(slots.part[slot])]
                epochs[slot], indices[slot], samples[slot] = self._substitute(part, int(slots.own[slot]))
        filled = [sample for sample in samples if sample is not None]
        return self._collated(slots, epochs, indices, filled, dict(bad))

    def _collated(
        self,
        slots: Slots,
        epochs: np.ndarray,
        indices: np.ndarray,
        samples: list[Sample],
        bad: dict[str, int],
    ) -> Batch:
        chances = uniform(self.seed, Stream.DROPOUT, epochs, indices).tolist()
        choices = uniform(self.seed, Stream.CAPTION, epochs, indices).tolist()
        captions = [
            choose_caption(sample.captions, choice, chance, self.text_dropout)
            for sample, choice, chance in zip(samples, choices, chances, strict=True)
        ]
        parts = slots.part
        readers = [self.stream.parts[number].reader for number in parts.tolist()]
        encoded = readers[0].encoded
        empty_caption = None if encoded is None else encoded.empty_caption
        batch = collate(samples, captions, slots.position.copy(), bad, empty_caption)
        if len(self.stream.parts) > 1:
            names = [self.stream.parts[number].name for number in parts.tolist()]
            batch.key = [f"{name}:{key}" for name, key in zip(names, batch.key, strict=True)]
        flipped = [
            each and reader.reads_pictures
            for each, reader in zip(self._flips(parts, epochs, indices), readers, strict=True)
        ]
        if any(flipped):
            mask = torch.tensor(flipped)
            batch.image[mask] = batch.image[mask].flip(-1)
        return batch

    def _flips(self, parts: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> list[bool]:
        may = np.array([part.reader.data.horizontal_flip for part in self.stream.parts])[parts]
        return (may & (uniform(self.seed, Stream.FLIP, epochs, indices) < 0.5)).tolist()

    def _wanted(self, part: Part, epoch: int, index: int) -> Wanted:
        data = part.reader.data
        if data.crop == "random":
            top, left = (
                uniform(self.seed, s, epoch, index).item() for s in (Stream.CROP_TOP, Stream.CROP_LEFT)
            )
            return Wanted(index, (top, left))
        flipped = data.horizontal_flip and not part.reader.reads_pictures
        return Wanted(index, None, flipped and uniform(self.seed, Stream.FLIP, epoch, index).item() < 0.5)

    def _substitute(self, part: Part, position: int) -> tuple[int, int, Sample]:
        tried: Counter[str] = Counter()
        last_s = time.monotonic() + MAX_DEADLINES * self.data.deadline_s
        for epoch, index in part.order.substitutes(position):
            (answer,) = part.reader.read([self._wanted(part, epoch, index)])
            if not isinstance(answer, BadSample):
                return epoch, index, answer
            # Where a whole shard is not there, looking costs nothing, and the good ones may be far away.
            tried[answer.cause] += answer.cause not in ("missing", "unreadable")
            if tried.total() > MAX_TRIES or time.monotonic() > last_s:
                break
        raise DataError(
            f"{part.reader.key}: a bad sample cannot be replaced: none of the samples that follow it can be read "
            f"({causes(tried)})."
        )

    def _prefetch(self, part: Part, epochs: np.ndarray, indices: np.ndarray) -> None:
        """Brings the shards closer that come after those of a batch."""
        shards, _ = part.reader.places(indices)
        here = (epochs.tobytes(), shards.tobytes())  # the same in most batches, and quickly compared
        if here == self._read_from.get(part.name):
            return
        for epoch, shard in sorted(set(zip(epochs.tolist(), shards.tolist(), strict=True))):
            following = part.order.following(epoch, shard)
            if following is not None:
                part.reader.shards.prefetch(following)
        self._read_from[part.name] = here

    def _count_bad(self, part: Part, error: BadSample) -> None:
        self._bad[error.cause] += 1
        self._first.setdefault(error.cause, error.key)
        of = f"{part.name}: " if part.name else ""
        self._say(logging.WARNING, f"skipped {of}{error.cause}", f"skipped {of}{error}")
        bad, allowed = self._bad.total(), self.data.max_bad_share
        if self._reads >= MIN_READS_TO_JUDGE and bad > allowed * self._reads:
            raise DataError(
                f"{part.reader.key}: {bad:,} of {plural(self._reads, 'sample')} read are bad "
                f"({causes(self._bad)}; the first: {', '.join(map(' '.join, self._first.items()))}); "
                f"allowed: a share of data.max_bad_share={allowed:g}."
            )


class BatchLoader(DataLoader):
    """A DataLoader that raises the DataError a worker hands over in the place of a batch. Where batches go on to a GPU
    they stay in page-locked memory, as uint8, until `Batch.to`.

    waiting: gives a context within which one batch is waited for
    """

    dataset: CaptionedImages
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            with self.waiting():
                batch = next(batches, None)
                if isinstance(batch, Batch) and not self.pin_memory:
                    batch = batch.to("cpu")
            if batch is None:
                return
            if isinstance(batch, DataError):
                raise batch
            yield batch

    @property
    def num_samples(self) -> int:
        """In an epoch of all parts together."""
        return len(self.dataset)

    def fingerprint(self) -> str:
        """The same where the same samples stand at the same positions."""
        return self.dataset.stream.fingerprint()

    def epochs(self, images: int) -> dict[str, float]:
        """How many epochs of each dataset `images` pictures are, from the beginning of the run."""
        return self.dataset.stream.epochs(images)


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
    """Batches of the datasets of `data` from the position `start_images` on.

    size_px: (H, W), or the side of a square
    batch_size: per rank
    text_dropout: probability that a caption is replaced by ""
    min_original_px: shortest original side allowed, where `data.filter_by_size`
    start_images: images seen so far by all ranks together; in buckets rounded down to whole batches
    num_images: images still to see by all ranks together, rounded up to whole batches; None: no end
    Batches do not depend on data.num_workers; those of R ranks with batch B, interleaved, are those of one
    rank with batch RB. `data.cache_mib` serves centred crops only, and each worker has a cache of its own.
    Raises DataError.
    """
    stream = build_stream(data, as_pair(size_px), batch_size, min_original_px, seed)
    if data.cache_mib and data.crop == "random":
        log.warning("data.cache_mib has no effect where data.crop is random")
    global_batch = batch_size * world_size
    batches = None if num_images is None else -(-num_images // global_batch)
    start = start_images // stream.unit * stream.unit
    return BatchLoader(
        CaptionedImages(data, stream, text_dropout=text_dropout, seed=seed),
        sampler=Positions(stream, start, batch_size, rank, world_size, batches),
        batch_size=None,  # the dataset's items are batches
        num_workers=data.num_workers,
        worker_init_fn=_leave_signals,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals(worker: int) -> None:
    """Clusters, `timeout` and terminals ask all processes of a run to stop, and a worker that did would take the step
    in progress with it: only the process that trains ends its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def wait() -> None:
        while signal.sigwaitinfo(STOPPING).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
