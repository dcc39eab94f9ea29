"""Samples of shards as pictures of one size, by index."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i.config import DataConfig
from t2i.data.captions import parse_captions, parse_metadata
from t2i.data.decode import BadSample, decode_image, image_bytes, resize_and_crop
from t2i.data.shards import ShardIndex, open_shards
from t2i.errors import DataError
from t2i.interfaces import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One sample as read: everything of it that does not change from epoch to epoch, unless crops do.

    picture: (3, H, W) uint8
    original_size: height and width of the source picture, from the JSON where that says so
    """

    picture: Tensor
    captions: list[str]
    key: str
    original_size: tuple[int, int]
    crop: tuple[int, int]
    metadata: dict[str, Any]


class SampleReader:
    """Reads the samples of some shards by their index in file order, at one size.

    shards: their indexes
    size_px: (H, W)
    min_original_px: samples whose JSON gives a shorter original side are left out; 0 keeps all
    cache_mib: pictures kept in memory. Nothing is evicted: every epoch reads every sample once, so that the
        oldest picture is the next to be wanted and a least-recently-used cache would never be hit.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        caption_keys: Sequence[str],
        size_px: tuple[int, int],
        min_original_px: int = 0,
        cache_mib: int = 0,
    ) -> None:
        self.shards = list(shards)
        self.caption_keys = caption_keys
        self.size_px = size_px
        rows = [_large_enough(shard, min_original_px) for shard in self.shards]
        self.shard_sizes = np.array([len(kept) for kept in rows])
        self._shard = np.repeat(np.arange(len(rows)), self.shard_sizes)
        self._row = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        keys = [key for shard in self.shards for key in shard.keys]
        self._ambiguous_keys = len(set(keys)) < len(keys)
        self._room = cache_mib * 2**20 // (3 * size_px[0] * size_px[1])
        self._cache: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._row)

    def key(self, index: int) -> str:
        """Unique in the dataset: keys that shards have in common get the shard's number in front."""
        key = self.shards[self._shard[index]].keys[self._row[index]]
        return f"{self._shard[index]}/{key}" if self._ambiguous_keys else key

    def read(self, index: int, place: tuple[float, float] | None = None) -> Sample:
        """Sample `index`, cropped at `place` (see `resize_and_crop`); centred ones are kept in memory.
        Raises BadSample."""
        if place is None and index in self._cache:
            return self._cache[index]
        shard, row, key = self.shards[self._shard[index]], int(self._row[index]), self.key(index)
        if shard.cut_short(row):
            raise BadSample("truncated", key, f"{shard.path} ends early")
        members = shard.read(row)
        metadata = parse_metadata(members, key)
        captions = parse_captions(members, metadata, self.caption_keys, key)
        image, stored_size = decode_image(image_bytes(members, key), key, self.size_px)
        picture, crop = resize_and_crop(image, stored_size, self.size_px, place)
        original_size = _original_size(metadata) or stored_size
        sample = Sample(picture, captions, key, original_size, crop, metadata)
        if place is None and len(self._cache) < self._room:
            self._cache[index] = sample
        return sample


def build_reader(data: DataConfig, size_px: tuple[int, int], min_original_px: int = 0) -> SampleReader:
    """A reader of `data.shards`. Raises DataError where no sample is there or is large enough."""
    if not data.shards:
        raise DataError("data.shards is not set; allowed: at least one path or URL.")
    shards = open_shards(data.shards)
    found = sum(map(len, shards))
    if not found:
        raise DataError(f"data.shards {data.shards!r} hold no samples.")
    reader = SampleReader(shards, data.caption_keys, size_px, min_original_px, data.cache_mib)
    if not len(reader):
        largest = max(int(_shorter_sides(shard).max(initial=0)) for shard in shards)
        raise DataError(
            f"data.shards: all {found} samples are smaller than min_original_px={min_original_px} (the "
            f"largest has {largest} px); lower min_original_px, or set data.filter_by_size=false."
        )
    return reader


def collate(samples: Sequence[Sample], captions: list[str], bad: dict[str, int]) -> Batch:
    """One batch; pixels 0..255 become -1..1."""
    return Batch(
        image=torch.stack([sample.picture for sample in samples]).float().div_(127.5).sub_(1.0),
        caption=captions,
        key=[sample.key for sample in samples],
        original_size=torch.tensor([sample.original_size for sample in samples]),
        crop=torch.tensor([sample.crop for sample in samples]),
        metadata=[sample.metadata for sample in samples],
        bad=bad,
    )


def read_all(
    data: DataConfig, shards: str | list[str], size_px: int | tuple[int, int], limit: int | None = None
) -> Batch:
    """The first `limit` good samples of `shards` in their order, as one batch: centred, not mirrored, the
    first caption of each. Bad samples are counted in `Batch.bad`. Raises DataError where no sample is good.
    """
    key = "data.heldout_shards" if shards == data.heldout_shards else "data.shards"
    reader = SampleReader(open_shards(shards, key), data.caption_keys, as_pair(size_px))
    samples: list[Sample] = []
    bad: Counter[str] = Counter()
    for index in range(len(reader)):
        if limit is not None and len(samples) >= limit:
            break
        try:
            samples.append(reader.read(index))
        except BadSample as error:
            bad[error.cause] += 1
            log.warning("skipped %s", error)
    if not samples:
        raise DataError(f"{key}: none of {len(reader)} samples can be read ({causes(bad)}).")
    return collate(samples, [sample.captions[0] for sample in samples], dict(bad))


def as_pair(size_px: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W); a number is the side of a square."""
    return (size_px, size_px) if isinstance(size_px, int) else size_px


def causes(bad: Counter[str]) -> str:
    """The table of causes in an error message: "image: 3, json: 1"."""
    return ", ".join(f"{cause}: {count}" for cause, count in bad.most_common()) or "none was there"


def _shorter_sides(shard: ShardIndex) -> np.ndarray:
    """(n,) float: the shorter original side in pixels by each sample's JSON, infinite where it is silent."""
    sides = np.full(len(shard), np.inf)
    for row in range(len(shard)):
        try:
            size = _original_size(parse_metadata(shard.read(row, ("json",)), shard.keys[row]))
        except BadSample:
            continue  # counted when it is read
        if size is not None:
            sides[row] = min(size)
    return sides


def _large_enough(shard: ShardIndex, min_original_px: int) -> np.ndarray:
    """int64 rows of the samples to keep."""
    if min_original_px <= 0:
        return np.arange(len(shard))
    return np.flatnonzero(_shorter_sides(shard) >= min_original_px)


def _original_size(metadata: dict[str, Any]) -> tuple[int, int] | None:
    height, width = metadata.get("original_height"), metadata.get("original_width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None
