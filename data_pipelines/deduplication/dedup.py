"""Pictures that are there more than once, byte for byte or nearly, and a selection that has each once.

Two pictures are near duplicates where their perceptual hashes differ in a few bits and their 8 x 8 thumbnails by
little. The hash alone sees no colours and few details: of 1,469 drawn people it takes 895 for duplicates, with
thumbnails 130 are left. Pairs are linked into groups, so that two of a group may differ by more than a pair may.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from t2i.errors import ConfigError
from t2i.launch.ranks import ALONE, Rank

from ..optional import need
from ..processes import leave_interrupts
from ..selection import listed_once, write_selection
from .hashing import HASHES, THUMBNAIL_PX, Hashes, hash_shard
from .near_duplicates import MAX_DISTANCE, group


@dataclass(frozen=True)
class Duplicates:
    """What was found among n samples, in the order of the shards.

    shards: where the samples come from; hashes: of each of these
    starts: (len(shards) + 1,) first row of each shard
    flaws: row -> why its picture cannot be used; such samples are kept and compared with none
    keeper: (n,) the row that stands for this one: itself, or the one that is kept in its place
    exact: samples whose bytes are those of an earlier one; near: further ones that are not kept
    """

    shards: list[str]
    hashes: list[Hashes]
    starts: np.ndarray
    flaws: dict[int, str]
    keeper: np.ndarray
    exact: int
    near: int

    @property
    def kept(self) -> np.ndarray:
        return self.keeper == np.arange(len(self.keeper))

    def name(self, row: int) -> tuple[str, str]:
        """Shard and key."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shards[shard], self.hashes[shard].keys[row - int(self.starts[shard])].as_py()

    def causes(self) -> Counter[str]:
        return Counter(self.flaws.values())


def hash_shards(
    shards: Sequence[str],
    algorithm: str,
    folder: Path,
    processes: int,
    progress: Callable[[int, int], None],
    rank: Rank = ALONE,
) -> tuple[list[str], list[Hashes]]:
    """The hashes of each of `shards` (paths and URLs of shards or selections, expanded), by several processes, kept
    in `folder`: a second call computes what is missing. progress is called with the shards done with and all.
    rank: of several jobs, each of which hashes its share"""
    if algorithm not in HASHES:
        raise ConfigError(f"--hash is {algorithm!r}; allowed: {', '.join(HASHES)}.")
    sources = listed_once(shards)[rank.rank :: rank.world]
    for package in ("imagehash", "faiss"):
        need(package, "dedup")
    jobs = [
        (each.url, None if each.keys is None else each.keys.to_pylist(), algorithm, folder)
        for each in sources
    ]
    found: list[Hashes] = []
    for path in _each(jobs, min(processes, len(jobs))):
        found.append(Hashes.open(path))
        progress(len(found), len(jobs))
    return [each.url for each in sources], found


def _each(jobs: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Path]:
    if processes <= 1:
        yield from (hash_shard(*job) for job in jobs)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), leave_interrupts)
    try:
        yield from pool.map(hash_shard, *zip(*jobs, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def find(
    shards: list[str],
    hashes: list[Hashes],
    distance: int,
    tolerance: int,
    progress: Callable[[int, int], None],
) -> Duplicates:
    """Groups the pictures and chooses of each group the one with the largest original, the first of several.

    distance: the most bits in which the hashes of a pair may differ, 0..MAX_DISTANCE; no such pair is missed
    tolerance: the most by which a value of their thumbnails may differ, 0..255; 255: the hash alone decides
    """
    for name, value, most in (("--distance", distance, MAX_DISTANCE), ("--tolerance", tolerance, 255)):
        if not 0 <= value <= most:
            raise ConfigError(f"{name} is {value}; allowed: 0 to {most}.")
    starts = np.cumsum([0, *(len(each.codes) for each in hashes)])
    flaws = {
        int(start + row): each.flaws[row].as_py()
        for start, each in zip(starts, hashes, strict=False)
        for row in np.flatnonzero(np.asarray(each.flaws.is_valid()))
    }
    good = np.setdiff1d(np.arange(starts[-1]), np.fromiter(flaws, np.int64), assume_unique=True)
    digests = np.concatenate([each.digests for each in hashes])[good]
    # Rows of the distinct pictures, the first of several with the same bytes, and which of these each good one is.
    _, first, same = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    distinct = good[first]

    def thumbnails(positions: np.ndarray) -> np.ndarray:
        rows = distinct[positions]
        shard = np.searchsorted(starts, rows, side="right") - 1
        out = np.empty((len(rows), THUMBNAIL_PX, THUMBNAIL_PX, 3), np.uint8)
        for number in np.unique(shard):
            here = shard == number
            out[here] = hashes[number].thumbnails[rows[here] - starts[number]]
        return out

    codes = np.concatenate([each.codes for each in hashes])[distinct]
    labels = group(codes, thumbnails, distance, tolerance, progress)[same.reshape(-1)]
    pixels = np.concatenate([each.pixels for each in hashes])[good]
    order = np.lexsort((good, -pixels, labels))  # by group, the largest first, then the first
    _, heads = np.unique(labels[order], return_index=True)
    keeper = np.arange(starts[-1])
    keeper[good] = good[order][heads][labels]
    return Duplicates(
        shards, hashes, starts, flaws, keeper, len(good) - len(distinct), len(distinct) - len(heads)
    )


def write_kept(found: Duplicates, out: Path) -> int:
    """Writes the selection of the samples that are kept, and returns how many they are."""
    pa = need("pyarrow", "data")
    parts = np.split(found.kept, found.starts[1:-1])
    keys = (each.keys.filter(pa.array(kept)) for each, kept in zip(found.hashes, parts, strict=True))
    return write_selection(out, found.shards, keys)
