"""Where the wanted members of each sample of an open shard lie, so that a sample is one read and no search."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from typing import NamedTuple

import numpy as np

from t2i.data.index import MAX_WASTE_BYTES, ShardIndex
from t2i.data.mapped import Mapped
from t2i.data.members import among
from t2i.data.tar import BLOCK

MAX_READ_BYTES = 64 << 20

# What of a tar header is looked at.
HEADER = np.dtype(
    {"names": ["name", "size"], "formats": ["S100", ("u1", 11)], "offsets": [0, 124], "itemsize": BLOCK}
)
OCTAL_SHIFTS = 3 * np.arange(10, -1, -1)
NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # only Linux has it


class Raw(NamedTuple):
    """The bytes of one sample, by extension.

    key: unique among the shards; key_in_shard: as the shard has it, and of a second sample of one key with "~2"
    """

    key: str
    key_in_shard: str
    members: dict[str, bytes]


_raw = tuple.__new__  # half the time of Raw(...)


class Layout:
    """Reads samples as `ShardIndex.read` does, those whose bytes the system has at hand. What is looked up there for
    each sample is computed here for all of a shard at once.

    file: descriptor of the open shard
    rows: (n,) of the index, the samples; -1 for what is not there
    endings: of the members that are wanted, see `members.among`; None: all
    prefix: see `Opened`
    mapped: the shard's bytes, whose headers are all looked at now, unless it is by its size and time of change the file
        that was indexed
    """

    def __init__(
        self,
        file: int,
        index: ShardIndex,
        rows: np.ndarray,
        endings: tuple[str, ...] | None,
        prefix: str = "",
        bare: str | tuple[str, ...] = "",
        mapped: Mapped | None = None,
    ) -> None:
        self.endings, self.mapped, self._prefix, self._bare = endings, mapped, prefix, bare
        self._file, self._keys = file, index.keys
        data = None if mapped is None else mapped.data
        indexed = (index.file_bytes, index.changed_ns)
        unchanged = mapped is not None and (mapped.file_bytes, mapped.changed_ns) == indexed
        offsets, sizes = index.offsets[rows], index.sizes[rows]
        there = offsets >= 0
        patterns, pattern = np.ones((1, there.shape[1]), dtype=bool), np.zeros(len(rows), dtype=np.int64)
        if not there.all():
            patterns, pattern = np.unique(there, axis=0, return_inverse=True)
        # Of each sample: its row and its pattern; where its read starts, and how long it is, 0 for those that are not
        # read here; and of each wanted member, where its bytes begin and end in what was read, or mapped.
        records = np.zeros((len(rows), 4 + 2 * there.shape[1]), dtype=np.int64)
        records[:, 0], records[:, 1] = rows, pattern
        self._wanted = []
        for number, present in enumerate(patterns):
            extensions = tuple(e for e, is_there in zip(index.extensions, present, strict=True) if is_there)
            meant = frozenset(extensions) if endings is None else among(extensions, endings)
            columns = [column for column, e in enumerate(index.extensions) if e in meant]
            self._wanted.append([(index.extensions[c], 4 + 2 * i) for i, c in enumerate(columns)])
            here = np.flatnonzero((pattern == number) & (rows >= 0))
            if columns and len(here):
                laid_out = _laid_out(offsets[here][:, columns], sizes[here][:, columns], index.file_bytes)
                if data is not None:
                    laid_out[:, 2:] += laid_out[:, :1]
                if data is not None and not unchanged:
                    keys = [index.keys[row] for row in rows[here].tolist()]
                    for column in columns:
                        name = f".{index.extensions[column]}"
                        as_indexed = _are_headers(
                            data, keys, name, offsets[here, column], sizes[here, column]
                        )
                        laid_out[~as_indexed, 1] = 0
                records[here, 2 : 2 + laid_out.shape[1]] = laid_out
        unread = np.isin(rows, [*index.flaws, *index.repeated])
        records[unread | (mapped is None and (file < 0 or not NOWAIT)), 3] = 0
        self._record = struct.Struct(f"{records.shape[1]}q")
        self._records = records.tobytes()

    def read(self, place: int) -> Raw | None:
        """A sample whose bytes are at hand; None for any other, and for whatever is not as it should be."""
        if not self._records:  # of a shard that could not be opened
            return None
        record = self._record.unpack_from(self._records, self._record.size * place)
        if not record[3]:
            return None
        key = self._keys[record[0]]
        members: dict[str, bytes] | None = None
        if self.mapped is None:
            members = self._read_now(key, record)
        elif (data := self.mapped.data) is not None:
            members = {extension: data[record[i] : record[i + 1]] for extension, i in self._wanted[record[1]]}
        if members is None:
            return None
        return _raw(Raw, (key if key.startswith(self._bare) else self._prefix + key, key, members))

    def _read_now(self, key: str, record: tuple[int, ...]) -> dict[str, bytes] | None:
        start, length = record[2:4]
        data = _own.buffer
        if length > len(data):
            data = _own.buffer = bytearray(2 * length)
        view = memoryview(data)
        try:
            # Never waits for a disk or a server, so that it needs no deadline.
            if os.preadv(self._file, (view[:length],), start, NOWAIT) != length:
                return None
        except OSError:
            return None
        name = key.encode("utf-8", "surrogateescape")
        members = {}
        for extension, i in self._wanted[record[1]]:
            at, end = record[i : i + 2]
            # The header of the member, as nearly all programs write it.
            header = f".{extension}\0".encode()
            if not data.startswith(name + header, at - BLOCK) or data[at - 388 : at - 377] != b"%011o" % (
                end - at
            ):
                return None
            members[extension] = bytes(view[at:end])
        return members


class _Own(threading.local):
    """What samples are read into, one after the other, one of each thread."""

    def __init__(self) -> None:
        self.buffer = bytearray(1 << 16)


_own = _Own()


def _laid_out(offsets: np.ndarray, sizes: np.ndarray, file_bytes: int) -> np.ndarray:
    """(n, k) of the wanted members of samples -> (n, 2 + 2 k): start and length of the read, of each member where it
    lies in it and its size."""
    start = offsets.min(axis=1) - BLOCK
    length = (offsets + sizes).max(axis=1) - start
    waste = length - (BLOCK + -(-sizes // BLOCK) * BLOCK).sum(axis=1)
    one_read = (length <= MAX_READ_BYTES) & (waste <= MAX_WASTE_BYTES) & (start + length <= file_bytes)
    found = np.empty((len(offsets), 2 + 2 * offsets.shape[1]), dtype=np.int64)
    found[:, 0], found[:, 1] = start, np.where(one_read, length, 0)
    found[:, 2::2] = offsets - start[:, None]
    found[:, 3::2] = found[:, 2::2] + sizes
    return found


def _are_headers(
    data: mmap.mmap, keys: list[str], ending: str, offsets: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """(n,) whether the headers before these offsets are those of members named by key and ending, with these sizes, as
    nearly all programs write them."""
    blocks = np.frombuffer(data, HEADER, len(data) // BLOCK)
    at = offsets // BLOCK - 1
    there = (offsets % BLOCK == 0) & (at >= 0) & (at < len(blocks)) & (offsets + sizes <= len(data))
    at = np.where(there, at, 0)
    names = f"{ending}\0".join([*keys, ""]).encode("utf-8", "surrogateescape").split(b"\0")[:-1]
    if len(names) != len(keys):  # one has a zero byte in it
        return np.zeros(len(keys), dtype=bool)
    same_size = ((sizes[:, None] >> OCTAL_SHIFTS & 7) == blocks["size"][at] ^ ord("0")).all(axis=1)
    return there & same_size & (blocks["name"][at] == np.array(names, dtype="S101"))
