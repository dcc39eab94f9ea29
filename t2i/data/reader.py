"""Samples of one dataset as pictures, or what was encoded of them, of the size that training wants."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i.data import buckets
from t2i.data.captions import parse_captions, parse_metadata
from t2i.data.decode import BadSample, decode_image, image_bytes, resize_and_crop
from t2i.data.encoded import EncodedShards, Preparation
from t2i.data.index import original_size
from t2i.data.members import SAMPLE_ENDINGS
from t2i.data.shards import Raw, Shards
from t2i.data.sources import Limits
from t2i.data.store import ShardStore
from t2i.data_config import DataConfig
from t2i.errors import DataError
from t2i.few import FewOfEach, plural
from t2i.interfaces import Batch

log = logging.getLogger(__name__)

TEXT_ENDINGS = ("txt", "json")


@dataclass(frozen=True)
class Sample:
    """One sample as read.

    picture: (3, H, W) uint8; (3, 0, 0) where it was encoded
    captions: with their weights
    key: unique in the dataset; key_in_shard: as the shard has it
    original_size: height and width of the source picture, from the JSON where that says so
    crop: top and left after resizing
    features: of encoded data the picture's tensors by name, as stored
    of_captions: of encoded data those of each caption
    picture_bytes: of the picture's file; 0 where it was encoded
    """

    picture: Tensor
    captions: dict[str, float]
    key: str
    key_in_shard: str
    original_size: tuple[int, int]
    crop: tuple[int, int]
    metadata: dict[str, Any]
    features: dict[str, Tensor] = field(default_factory=dict)
    of_captions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    picture_bytes: int = 0


@dataclass(frozen=True)
class Wanted:
    """A sample to read: its index, and where to crop it (None: in the middle), and whether it is mirrored."""

    index: int
    place: tuple[float, float] | None = None
    flipped: bool = False


class SampleReader:
    """Reads the samples of one dataset by their index in the order of its shards.

    size_px: (H, W) where there are no buckets
    min_original_px: samples whose JSON gives a shorter original side are left out; 0 keeps all
    key: the configuration key of the dataset, for errors
    needs_captions: whether a sample without one is a bad one; else its caption is ""
    Pictures are kept in memory up to data.cache_mib. Nothing is evicted: every epoch reads every sample once, so that
    the oldest picture is the next to be wanted and a least-recently-used cache would never be hit.
    Raises DataError where no sample is there or is large enough.
    """

    def __init__(
        self,
        data: DataConfig,
        size_px: tuple[int, int],
        min_original_px: int = 0,
        key: str = "data",
        shards: str | list[str] | None = None,
        allow_pipes: bool = False,
        needs_captions: bool = True,
    ) -> None:
        self.data, self.size_px, self.needs_captions = data, size_px, needs_captions
        store = ShardStore(Limits(data.deadline_s), data.shard_cache_gib, allow_pipes)
        named = (
            f"{key}.heldout_shards"
            if shards is not None and shards == data.heldout_shards
            else f"{key}.shards"
        )
        shards = shards or data.shards
        if not shards:
            raise DataError(f"{named} is not set; allowed: at least one path or URL.")
        self.key = named
        keep_open = 4 * data.shuffle_window_shards
        self.shards = Shards(shards, store, named, keep_open, data.max_bad_share)
        found = int(self.shards.sizes.sum())
        if not found:
            raise DataError(f"{named} {shards!r} hold no samples.")
        if min_original_px > 0:
            self._leave_out_small(min_original_px, found)
        self.encoded: EncodedShards | None = None
        if data.encoded is not None:
            self.encoded = EncodedShards(data.encoded, store, data.horizontal_flip)
            if self.encoded.of_pictures:
                self._check_prepared(self.encoded.record.preparation)
        self.starts = np.concatenate([[0], np.cumsum(self.shards.sizes)])
        self.shapes, self.buckets = [size_px], None
        if data.bucket_step_px is not None:
            self.shapes = bucket_shapes_of(data, size_px)
            assigned = [buckets.assign(sizes, self.shapes) for sizes in self.shards.original_px()]
            self.buckets = np.concatenate(assigned)
        self._room = data.cache_mib * 2**20 // (3 * size_px[0] * size_px[1])
        self._cache: dict[int, Sample] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def reads_pictures(self) -> bool:
        """Whether pictures are read, and not what was encoded of them."""
        return self.encoded is None or not self.encoded.of_pictures

    def shape(self, index: int) -> tuple[int, int]:
        """(H, W) of sample `index` after cropping."""
        return self.shapes[0] if self.buckets is None else self.shapes[self.buckets[index]]

    def places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) samples -> (n,) their shards, and (n,) their places in them, int64."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        return shards, indices - self.starts[shards]

    def read(self, wanted: Sequence[Wanted]) -> list[Sample | BadSample]:
        """Samples, or what is wrong with them."""
        kept = [self._kept(each) for each in wanted]
        missing = [each.index for each, sample in zip(wanted, kept, strict=True) if sample is None]
        shards, places = self.places(np.array(missing, dtype=np.int64))
        raw = iter(
            self.shards.read(
                list(zip(shards.tolist(), places.tolist(), strict=True)),
                SAMPLE_ENDINGS if self.reads_pictures else TEXT_ENDINGS,
            )
        )
        return [sample or self._made(each, next(raw)) for each, sample in zip(wanted, kept, strict=True)]

    def _kept(self, wanted: Wanted) -> Sample | None:
        return self._cache.get(wanted.index) if wanted.place is None else None

    def _made(self, wanted: Wanted, raw: Raw | BadSample) -> Sample | BadSample:
        if isinstance(raw, BadSample):
            return raw
        try:
            return self._kept(wanted) or self._sample(wanted, raw)  # kept: it stands twice in this batch
        except BadSample as error:
            return error

    def _sample(self, wanted: Wanted, raw: Raw) -> Sample:
        metadata = parse_metadata(raw.members, raw.key)
        try:
            captions = parse_captions(raw.members, metadata, self.data.caption_keys, raw.key)
        except BadSample:
            if self.needs_captions:
                raise
            captions = {"": 1.0}
        shape = self.shape(wanted.index)
        features: dict[str, Tensor] = {}
        of_captions: dict[str, dict[str, Tensor]] = {}
        picture_bytes = 0
        if self.encoded is not None:
            shards, places = self.places(np.array([wanted.index]))
            shard, place = int(shards[0]), int(places[0])
            found = self.encoded.sample(
                self.shards.url(shard),
                raw.key_in_shard,
                captions,
                shape,
                wanted.flipped,
                self.shards.picture_bytes(shard, place),
            )
            stored_size, crop = found.original_size, found.crop
            features, of_captions = found.image, found.captions
        if self.reads_pictures:
            data = image_bytes(raw.members, raw.key)
            picture_bytes = len(data)
            image, stored_size = decode_image(data, raw.key, shape)
            picture, crop = resize_and_crop(image, stored_size, shape, wanted.place)
        else:
            picture = torch.empty(3, 0, 0, dtype=torch.uint8)
        original = original_size(metadata) or stored_size
        sample = Sample(
            picture,
            captions,
            raw.key,
            raw.key_in_shard,
            original,
            crop,
            metadata,
            features,
            of_captions,
            picture_bytes,
        )
        if self.encoded is None and wanted.place is None and len(self._cache) < self._room:
            self._cache[wanted.index] = sample
        return sample

    def _leave_out_small(self, min_original_px: int, found: int) -> None:
        largest = self.shards.keep(min_original_px)
        if not self.shards.sizes.sum():
            raise DataError(
                f"{self.key}: none of {plural(found, 'sample')} has min_original_px={min_original_px} (the "
                f"largest has {largest} px); lower min_original_px, or set data.filter_by_size=false."
            )

    def _check_prepared(self, made: Preparation) -> None:
        own = preparation(self.data, self.size_px)
        for name in ("size_px", "bucket_step_px", "max_aspect"):
            there, here = getattr(made, name), getattr(own, name)
            if there != here and not (name == "max_aspect" and own.bucket_step_px is None):
                raise DataError(
                    f"data.encoded={self.data.encoded} was made with {name}={there}, this run has {name}={here}; "
                    "encode again with this run's settings."
                )


def preparation(data: DataConfig, size_px: tuple[int, int]) -> Preparation:
    """How `data` brings pictures to their size."""
    return Preparation(size_px, data.bucket_step_px, data.max_aspect)


def bucket_shapes_of(data: DataConfig, size_px: tuple[int, int]) -> list[tuple[int, int]]:
    """Raises DataError where the buckets do not fit the size."""
    step = data.bucket_step_px
    assert step is not None
    if size_px[0] != size_px[1] or size_px[0] % step:
        raise DataError(
            f"data.bucket_step_px is {step}; allowed with pictures of {size_px[0]} px: what divides them."
        )
    return buckets.bucket_shapes(size_px[0], step, data.max_aspect)


def collate(
    samples: Sequence[Sample],
    captions: list[str],
    positions: np.ndarray,
    bad: dict[str, int],
    empty_caption: dict[str, Tensor] | None = None,
) -> Batch:
    """One batch, its pixels 0..255 as uint8 (see `Batch.to`).

    empty_caption: the tensors of "", where captions were encoded
    """
    rows = [
        s.features | s.of_captions.get(c, empty_caption or {}) for s, c in zip(samples, captions, strict=True)
    ]
    columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Batch(
        image=torch.stack([sample.picture for sample in samples]),
        caption=captions,
        key=[sample.key for sample in samples],
        original_size=torch.tensor([sample.original_size for sample in samples]),
        crop=torch.tensor([sample.crop for sample in samples]),
        metadata=[sample.metadata for sample in samples],
        position=torch.from_numpy(positions),
        bad=bad,
        features={name: x.float() if x.is_floating_point() else x for name, x in columns.items()},
    )


def read_all(
    data: DataConfig,
    shards: str | list[str] | None,
    size_px: int | tuple[int, int],
    limit: int | None = None,
    allow_pipes: bool = False,
) -> Batch:
    """The first `limit` good samples of `shards` in their order, as one batch: centred, not mirrored, the
    first caption of each. Bad samples are counted in `Batch.bad`. Raises DataError where no sample is good.

    allow_pipes: whether `pipe:` sources may run: only where `data` is what a person typed, not what a checkpoint says
    """
    plain = dataclasses.replace(data, encoded=None, bucket_step_px=None)
    reader = SampleReader(plain, as_pair(size_px), shards=shards, allow_pipes=allow_pipes)
    samples: list[Sample] = []
    bad: Counter[str] = Counter()
    say = FewOfEach(log)
    for index in range(len(reader)):
        if limit is not None and len(samples) >= limit:
            break
        (sample,) = reader.read([Wanted(index)])
        if isinstance(sample, BadSample):
            bad[sample.cause] += 1
            say(logging.WARNING, f"skipped {sample.cause}", f"skipped {sample}")
        else:
            samples.append(sample)
    if not samples:
        raise DataError(f"{reader.key}: none of {plural(len(reader), 'sample')} can be read ({causes(bad)}).")
    return collate(
        samples, [next(iter(sample.captions)) for sample in samples], np.arange(len(samples)), dict(bad)
    ).to("cpu")


def as_pair(size_px: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W); a number is the side of a square."""
    return (size_px, size_px) if isinstance(size_px, int) else size_px


def causes(bad: Counter[str]) -> str:
    """The table of causes in an error message: "image: 3, json: 1"."""
    return ", ".join(f"{cause}: {count}" for cause, count in bad.most_common()) or "none was there"
