"""Where the wanted members of each sample of an open shard lie, so that a sample is one read and no search."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import numpy as np

from t2i.data.index import MAX_WASTE_BYTES, ShardIndex
from t2i.data.members import among
from t2i.data.tar import BLOCK

MAX_READ_BYTES = 64 << 20

NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # only Linux has it


class Raw(NamedTuple):
    """The bytes of one sample, by extension.

    key: unique among the shards; key_in_shard: as the shard has it, and of a second sample of one key with "~2"
    """

    key: str
    key_in_shard: str
    members: dict[str, bytes]


class Layout:
    """Reads samples as `ShardIndex.read` does, those whose bytes the system has at hand. What is looked up there for
    each sample is computed here for all of a shard at once.

    file: descriptor of the open shard
    rows: (n,) of the index, the samples; -1 for what is not there
    endings: of the members that are wanted, see `members.among`; None: all
    prefix: see `Opened`
    """

    def __init__(
        self,
        file: int,
        index: ShardIndex,
        rows: np.ndarray,
        endings: tuple[str, ...] | None,
        prefix: str = "",
        bare: str | tuple[str, ...] = "",
    ) -> None:
        self.endings, self._prefix, self._bare = endings, prefix, bare
        self._file, self._keys = file, index.keys
        self._readable = file >= 0 and NOWAIT > 0
        offsets, sizes = index.offsets[rows], index.sizes[rows]
        there = offsets >= 0
        patterns, pattern = np.ones((1, there.shape[1]), dtype=bool), np.zeros(len(rows), dtype=np.int64)
        if not there.all():
            patterns, pattern = np.unique(there, axis=0, return_inverse=True)
        # Of each sample: its row and its pattern; where its read starts, and how long it is, 0 for those that are not
        # read here; and of each wanted member, where it lies in what was read, and its size.
        records = np.zeros((len(rows), 4 + 2 * there.shape[1]), dtype=np.int64)
        records[:, 0], records[:, 1] = rows, pattern
        self._wanted = []
        for number, present in enumerate(patterns):
            extensions = tuple(e for e, is_there in zip(index.extensions, present, strict=True) if is_there)
            meant = frozenset(extensions) if endings is None else among(extensions, endings)
            columns = [column for column, e in enumerate(index.extensions) if e in meant]
            self._wanted.append(
                [(index.extensions[c], f".{index.extensions[c]}\0".encode()) for c in columns]
            )
            here = np.flatnonzero((pattern == number) & (rows >= 0))
            if columns and len(here):
                laid_out = _laid_out(offsets[here][:, columns], sizes[here][:, columns], index.file_bytes)
                records[here, 2 : 2 + laid_out.shape[1]] = laid_out
        records[np.isin(rows, [*index.flaws, *index.repeated]), 3] = 0
        self._records, self._width = memoryview(records.ravel()), records.shape[1]  # type: ignore[arg-type]

    def read(self, place: int) -> Raw | None:
        """A sample whose bytes are at hand; None for any other, and for whatever is not as it should be."""
        at = self._width * place
        if not self._readable:
            return None
        row, pattern, start, length, *places = self._records[at : at + self._width]
        if not length:
            return None
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
        key = self._keys[row]
        name = key.encode("utf-8", "surrogateescape")
        members = {}
        i = 0
        for extension, ending in self._wanted[pattern]:
            at, size = places[i], places[i + 1]
            i += 2
            # The header of the member, as nearly all programs write it.
            if not data.startswith(name + ending, at - BLOCK) or data[at - 388 : at - 377] != b"%011o" % size:
                return None
            members[extension] = bytes(view[at : at + size])
        return Raw(key if key.startswith(self._bare) else self._prefix + key, key, members)


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
    found[:, 2::2], found[:, 3::2] = offsets - start[:, None], sizes
    return found
