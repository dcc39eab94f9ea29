"""Shards mapped into memory, where a small read is a copy of bytes and no call of the system.

A call would answer with an error what here has no answer: a page that does not come is waited for without a deadline,
and one that is not in the file any more ends the process. So only files on disks of this machine are mapped, all of a
file is in memory before its first read, and whether it has changed is asked before each batch.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from functools import lru_cache
from weakref import WeakValueDictionary

import numpy as np

from t2i.data.sources import within

MAX_FILE_BYTES = 256 << 20
MAX_BYTES = 1 << 30  # in one process
# File systems whose pages come from this machine; one that is not named may ask a server.
LOCAL = {"bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs"}
LOCAL |= {"tmpfs", "xfs", "zfs"}
LIBC = ctypes.CDLL(None, use_errno=True)
POPULATE_READ = 22  # Linux' MADV_POPULATE_READ: an error where to touch a page would end the process


class Mapped:
    """All bytes of an open file. data: None once others have taken their place

    file: descriptor
    found: what `os.fstat` said of it before
    """

    def __init__(self, file: int, found: os.stat_result, data: mmap.mmap) -> None:
        self.data: mmap.mmap | None = data
        self._file, self._size, self._changed_ns = file, found.st_size, found.st_mtime_ns

    def holds(self) -> bool:
        """Whether the bytes are there, and still those of the file."""
        found = os.fstat(self._file)
        unchanged = found.st_size == self._size and found.st_mtime_ns == self._changed_ns
        return unchanged and self.data is not None


_made: WeakValueDictionary[int, Mapped] = WeakValueDictionary()  # the oldest first
_numbers = itertools.count()


def map_file(file: int, deadline_s: float) -> Mapped | None:
    """All of an open file, in the place of the oldest ones where together they would be more than MAX_BYTES. None where
    it is too large, not on a local file system, or not brought by the system within the deadline."""
    try:
        found = os.fstat(file)
        if not 0 < found.st_size <= MAX_FILE_BYTES or not _is_local(file, found.st_dev):
            return None
        data = within(deadline_s, lambda: _at_hand(file, found.st_size))
    except (
        OSError,
        ValueError,
    ):  # no Linux, or an old one; a limit of the process; the file was cut short just now
        return None
    excess = (
        found.st_size - MAX_BYTES + sum(len(each.data) for each in _made.values() if each.data is not None)
    )
    for each in list(_made.values()):
        if excess > 0 and each.data is not None:
            excess, each.data = excess - len(each.data), None
    _made[next(_numbers)] = made = Mapped(file, found, data)
    return made


def _at_hand(file: int, size: int) -> mmap.mmap:
    data = mmap.mmap(file, size, prot=mmap.PROT_READ)
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    # Not `data.madvise`, which lets no other thread run meanwhile, so that there would be no deadline.
    if LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), POPULATE_READ):
        raise OSError(ctypes.get_errno(), "it cannot be brought into memory")
    return data


def _is_local(file: int, device: int) -> bool:
    """By the mount that the file was opened on."""
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as lines:
        mount = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    return _file_system(mount, device) in LOCAL


@lru_cache(maxsize=64)
def _file_system(mount: str, device: int) -> str:
    """device: of a file there, as the number of a mount may be given again"""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return next(line.partition(" - ")[2].split()[0] for line in lines if line.startswith(f"{mount} "))
