"""Shards mapped into memory, where a small read is a copy of bytes and no call of the system.

A call would answer with an error what here has no answer: a page that does not come is waited for without a deadline,
and one that is not in the file any more ends the process. So only files on disks of this machine are mapped, all of a
file is in memory before its first read, and whether it has changed is asked before a batch, after a
millisecond again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from functools import lru_cache
from operator import itemgetter
from weakref import WeakSet

import numpy as np

from t2i.data.sources import within

MAX_FILE_BYTES = 256 << 20
MAX_BYTES = 1 << 30  # in one process
LOOK_AGAIN_S = 0.001
# File systems whose pages come from this machine; one that is not named may ask a server.
LOCAL = {"bcachefs", "btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "squashfs"}
LOCAL |= {"tmpfs", "xfs", "zfs"}
LIBC = ctypes.CDLL(None, use_errno=True)
POPULATE_READ = 22  # Linux' MADV_POPULATE_READ: an error where to touch a page would end the process


class Mapped:
    """All bytes of an open file. data: None once others have taken their place

    file: descriptor
    found: what `os.fstat` said of it before
    file_bytes, changed_ns: of it
    asked_s: when it was last asked for, by `time.monotonic`
    """

    def __init__(self, file: int, found: os.stat_result, data: mmap.mmap) -> None:
        self.data: mmap.mmap | None = data
        self.asked_s = self._look_again_s = time.monotonic()
        self._file, self.file_bytes, self.changed_ns = file, found.st_size, found.st_mtime_ns

    def holds(self) -> bool:
        """Whether the bytes are there, and a moment ago were still those of the file."""
        self.asked_s = time.monotonic()
        if self.asked_s >= self._look_again_s:
            found = os.fstat(self._file)
            if (found.st_size, found.st_mtime_ns) != (self.file_bytes, self.changed_ns):
                self.data = None
            self._look_again_s = self.asked_s + LOOK_AGAIN_S
        return self.data is not None


_made: WeakSet[Mapped] = WeakSet()
_lock = threading.Lock()


def map_file(file: int, deadline_s: float, ahead: bool = False) -> Mapped | None:
    """All of an open file, in the place of those not asked for longest where together they would be more than
    MAX_BYTES. None where it is too large, not on a local file system, not brought by the system within the deadline,
    or there is no room.

    ahead: it is not read yet, and leaves the half of MAX_BYTES that was asked for last its place
    """
    try:
        found = os.fstat(file)
        if not 0 < found.st_size <= MAX_FILE_BYTES or not _is_local(file, found.st_dev):
            return None
        if not _made_room(found.st_size, MAX_BYTES // 2 if ahead else 0):
            return None
        made = Mapped(file, found, within(deadline_s, lambda: _at_hand(file, found.st_size)))
    except (
        OSError,
        ValueError,
    ):  # no Linux, or an old one; a limit of the process; the file was cut short just now
        return None
    with _lock:
        _made.add(made)
    return made


def _made_room(size: int, kept: int) -> bool:
    """Whether there is room for so many bytes, where all but the last `kept` of those that are mapped may go."""
    with _lock:
        held = [(each.asked_s, each, each.data) for each in _made if each.data is not None]
    total = sum(len(data) for _, _, data in held)
    for _, each, data in sorted(held, key=itemgetter(0)):
        if total + size <= MAX_BYTES:
            return True
        if total - len(data) < kept:
            return False
        total, each.data = total - len(data), None
    return True


def _in_forked_process() -> None:
    """There another thread may have held the lock, which does not live on."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_process)


def _at_hand(file: int, size: int) -> mmap.mmap:
    data = mmap.mmap(file, size, prot=mmap.PROT_READ)
    address = np.frombuffer(data, dtype=np.uint8).ctypes.data
    # Not `data.madvise`, which lets no other thread run meanwhile, so that there would be no deadline.
    if LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), POPULATE_READ):
        raise OSError(ctypes.get_errno(), "it cannot be brought into memory")
    return data


def _is_local(file: int, device: int) -> bool:
    """By the mount that the file was opened on; no where the system does not say, as within chroot."""
    with open(f"/proc/self/fdinfo/{file}", encoding="ascii") as lines:
        mount = next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")
    return _file_system(mount, device) in LOCAL


@lru_cache(maxsize=64)
def _file_system(mount: str, device: int) -> str:
    """device: of a file there, as the number of a mount may be given again"""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        return next(
            (line.partition(" - ")[2].split()[0] for line in lines if line.startswith(f"{mount} ")), ""
        )
