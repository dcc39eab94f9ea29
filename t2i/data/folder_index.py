"""What `t2i data index` says of a folder of shards at once, so that a start over many of them opens none.

`index.json` lists the shards: how many samples, how many bytes. It names `index.<digits>.sizes`, where the source
picture of each sample has 4 bytes, its height and width as little-endian uint16, 0 where unknown; those of a shard
begin at its `first` sample. That file has a new name whenever it is written: the two cannot contradict each other, and
a copy of it never gets old.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import dataclass, field

import numpy as np

from t2i.data import sources
from t2i.data.sources import SourceError, within
from t2i.data.store import ShardStore
from t2i.errors import DataError

log = logging.getLogger(__name__)

SUMMARY = "index.json"
NAMED = re.compile(r"[0-9a-f]{16}")
MAX_SAMPLES = 10**7  # of a shard; who claims more is not believed
MAX_FIRST = 2**50
SAMPLE_BYTES = 4
MAX_SIDE_PX = 2**16 - 1


@dataclass(frozen=True)
class FolderIndex:
    """The shards of a folder.

    place: of index.json
    row_of: of each shard, by its name, the row in `samples`, `bytes` and `first`, (n,) int64
    first: the first of its samples in the file of sizes; -1 where that has none of it
    flawed: row -> those samples of the shard that the tar file lost, although their size is known
    sizes: place of the file of sizes; "" where there is none: an older version made the index
    """

    place: str = ""
    row_of: dict[str, int] = field(default_factory=dict)
    samples: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    first: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    flawed: dict[int, list[int]] = field(default_factory=dict)
    sizes: str = ""


def read_folder_index(place: str, limits: sources.Limits) -> FolderIndex:
    """What the index.json at `place` says; nothing where there is none, or somebody else's."""
    if not place:
        return FolderIndex()
    try:
        values = json.loads(sources.read_bytes(place, limits))
        names, entries = list(values["shards"]), list(values["shards"].values())
        samples, size_bytes = (
            np.array([int(entry[key]) for entry in entries], dtype=np.int64) for key in ("samples", "bytes")
        )
        first = np.array([int(entry.get("first", -1)) for entry in entries], dtype=np.int64)
        believed = (samples >= 0) & (samples <= MAX_SAMPLES)
        first[~believed | (first > MAX_FIRST)] = -1
        flawed = {
            row: list(map(int, entry["flawed"])) for row, entry in enumerate(entries) if "flawed" in entry
        }
        digits = values.get("sizes")
        named = isinstance(digits, str) and NAMED.fullmatch(digits)
        return FolderIndex(
            place,
            {name: row for row, name in enumerate(names) if believed[row]},
            samples,
            size_bytes,
            first if named else np.full_like(first, -1),
            flawed,
            place.removesuffix(SUMMARY) + sizes_name(digits) if named else "",
        )
    except SourceError as error:
        if not error.missing:
            log.warning("%s", error)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    return FolderIndex()


def sizes_name(digits: str) -> str:
    return f"index.{digits}.sizes"


def as_stored(sizes_px: np.ndarray) -> np.ndarray:
    """(n, 2) heights and widths of any integers -> uint16, by which samples are chosen wherever they come from. A
    picture with a side of more than MAX_SIDE_PX is scaled down to that."""
    longest = sizes_px.max(axis=1, initial=0)
    if (large := longest > MAX_SIDE_PX).any():
        sizes_px = sizes_px.astype(np.int64)
        scaled = sizes_px[large] * MAX_SIDE_PX // longest[large, None]
        sizes_px[large] = np.where(sizes_px[large] > 0, np.maximum(scaled, 1), 0)
    return sizes_px.astype(np.dtype("<u2"))


class SizesFile:
    """The sizes of all samples of a folder, read piece by piece. Raises SourceError where it cannot be opened, or is
    shorter than the index says."""

    def __init__(self, index: FolderIndex, store: ShardStore) -> None:
        self.name, self.deadline_s = index.sizes, store.limits.deadline_s
        self._file = store.open(index.sizes)
        there = within(self.deadline_s, lambda: os.fstat(self._file.fileno())).st_size
        wanted = SAMPLE_BYTES * int((index.first + index.samples)[index.first >= 0].max(initial=0))
        if there < wanted:
            raise SourceError(self.name, f"it has {there} bytes, and {SUMMARY} speaks of {wanted}")

    def read(self, first: np.ndarray, count: np.ndarray) -> np.ndarray:
        """(n,) first samples and (n,) numbers of samples -> (sum of `count`, 2) uint16. Raises SourceError."""
        # What lies side by side is one read.
        begins = np.flatnonzero(np.append(True, first[1:] != (first + count)[:-1]))
        pieces = list(zip(first[begins].tolist(), np.add.reduceat(count, begins).tolist(), strict=True))

        def read_all() -> bytes:
            return b"".join(
                os.pread(self._file.fileno(), SAMPLE_BYTES * many, SAMPLE_BYTES * start)
                for start, many in pieces
            )

        try:
            data = within(self.deadline_s, read_all)
        except OSError as error:
            raise SourceError(self.name, str(error)) from error
        if len(data) != SAMPLE_BYTES * count.sum():
            raise SourceError(self.name, "it ends too early")
        return np.frombuffer(data, dtype=np.dtype("<u2")).reshape(-1, 2)


def open_sizes(index: FolderIndex, store: ShardStore) -> SizesFile | None:
    """None, said in the log, where it cannot be read: every shard then has to be asked itself."""
    try:
        return SizesFile(index, store)
    except (DataError, OSError) as error:
        log.warning("%s The shards are asked one by one.", str(error).rstrip(".") + ".")
        return None
