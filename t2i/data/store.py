"""Local files of shards: local ones as they are, remote ones copied into a folder of bounded size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from t2i.data import sources
from t2i.data.compressed import MAX_UNPACKED_GIB, is_compressed, unpack
from t2i.data.sources import Limits, SourceError, within
from t2i.files import user_cache

log = logging.getLogger(__name__)

POLL_S = 0.05


def cache_folder() -> Path:
    """Where copies of remote shards lie."""
    return user_cache() / "shards"


class ShardStore:
    """Copies shards whole, one large read each, because object stores punish random access; the processes of a node
    share the copies, and wait for whichever of them copies first.

    max_gib: the least recently opened copies are removed beyond this. Whoever has one open may read on; a copy that
        is wanted again is made again, so that only time is lost where this is less than what is open at a time
    allow_pipes: whether `pipe:` sources may run; not where a source comes from a checkpoint's configuration
    """

    def __init__(self, limits: Limits, max_gib: float = MAX_UNPACKED_GIB, allow_pipes: bool = False) -> None:
        self.limits, self.max_bytes, self.allow_pipes = limits, int(max_gib * 2**30), allow_pipes
        self._told = False
        self.told_of_index = False  # that one beside a shard cannot be read

    def path(self, url: str) -> Path:
        """The local file of `url`, copied now if need be. Raises SourceError."""
        if sources.is_local(url):
            return sources.local_path(url)
        copied = self._place(url)
        if not copied.exists():
            self._copy(url, copied)
        with contextlib.suppress(OSError):
            os.utime(copied)  # what is used stays
        return copied

    def open(self, url: str) -> IO[bytes]:
        """The local file of `url`, open and unbuffered. A copy that another process removed to free space, before it
        could be opened here, is made again. Raises SourceError or OSError."""
        for attempt in range(self.limits.attempts + 1):
            path = self.path(url)
            try:
                return within(self.limits.deadline_s, partial(_open_file, path))
            except FileNotFoundError:
                if sources.is_local(url) or attempt == self.limits.attempts:
                    raise SourceError(url, "", missing=sources.is_local(url)) from None
        raise AssertionError("attempts is at least 0")

    def open_tar(self, url: str) -> IO[bytes]:
        """As `open`, of a shard: a local one that is compressed is unpacked beside the copies first, as copies are when
        they are made. Raises DataError or OSError."""
        file = self.open(url)
        if not sources.is_local(url) or not within(self.limits.deadline_s, lambda: is_compressed(file, url)):
            return file
        with file:
            found = os.fstat(file.fileno())
            known_by = f"{sources.local_path(url).absolute()}\0{found.st_size}\0{found.st_mtime_ns}"
            unpacked = self._named(known_by, sources.stem(url))
            if not (self._told or unpacked.exists()):
                self._told = True
                log.info("compressed shards such as %s are unpacked to %s first", url, unpacked.parent)
            for _ in range(self.limits.attempts + 1):
                self._make(url, unpacked, lambda part: unpack(file, url, part, self.max_bytes))
                with contextlib.suppress(FileNotFoundError):  # another process removed it to free space
                    return unpacked.open("rb", buffering=0)
        raise SourceError(url, "its unpacked copy is removed before it is read; raise data.shard_cache_gib")

    def bring(self, url: str) -> None:
        """Copies a remote shard, if no other process does that now. Raises SourceError."""
        copied = self._place(url)
        if not copied.exists():
            with _locked(url, copied, wait=None) as mine:
                if mine:
                    self._make_locked(url, copied, partial(self._fetch, url))

    def _place(self, url: str) -> Path:
        if url.startswith("pipe:") and not self.allow_pipes:
            raise SourceError(url, "a command is run only where the command line names it")
        return self._named(url, sources.stem(url))

    @staticmethod
    def _named(known_by: str, stem: str) -> Path:
        digest = hashlib.sha256(known_by.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cache_folder() / f"{digest}-{stem[-80:]}.tar"

    def _copy(self, url: str, copied: Path) -> None:
        self._make(url, copied, partial(self._fetch, url))

    def _make(self, url: str, copied: Path, make: Callable[[Path], None]) -> None:
        """make: writes the file that it is given"""
        if copied.exists():
            return
        # Whoever copies has deadlines of its own; no growth for longer than these says that it hangs nevertheless.
        wait_s = self.limits.deadline_s * (self.limits.attempts + 1)
        with _locked(url, copied, wait_s) as mine:
            if copied.exists():
                return
            if not mine:
                raise SourceError(url, f"another process did not get on with it for {wait_s:g} s")
            self._make_locked(url, copied, make)

    def _make_locked(self, url: str, copied: Path, make: Callable[[Path], None]) -> None:
        if copied.exists():
            return
        part = _part(copied)
        try:
            make(part)
            part.replace(copied)
        except OSError as error:  # of this machine's disk
            raise _takes_none(url, copied, error) from error
        finally:
            part.unlink(missing_ok=True)
        self._evict(but=copied)

    def _fetch(self, url: str, part: Path) -> None:
        sources.copy(url, part, self.limits)
        with part.open("rb") as file:
            if not is_compressed(file, url):
                return
            unpacked = part.with_name(part.name + ".unpacked")
            try:
                unpack(file, url, unpacked, self.max_bytes)
                unpacked.replace(part)
            finally:
                unpacked.unlink(missing_ok=True)

    def _evict(self, but: Path) -> None:
        found = []
        for path in cache_folder().glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            if path != but:
                path.unlink(missing_ok=True)
                total -= size


def _open_file(path: Path) -> IO[bytes]:
    sources.check_is_file(path)
    return path.open("rb", buffering=0)


def read_ahead(file: IO[bytes]) -> None:
    """Asks the kernel to read all of a local file in large pieces, ahead of the small reads to come; on disks and
    network file systems that makes one sequential read of what is then read sample by sample."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _takes_none(url: str, copied: Path, error: OSError) -> SourceError:
    return SourceError(url, f"{copied.parent} takes no copy: {error.strerror or error}")


def _part(copied: Path) -> Path:
    return copied.with_name(copied.name + ".part")


@contextlib.contextmanager
def _locked(url: str, copied: Path, wait: float | None) -> Iterator[bool]:
    """True with the lock of `copied`; False without it, at once where `wait` is None, else once `copied` is there or
    has not grown for `wait` seconds. The system frees the lock of a process that dies. Raises SourceError."""
    try:
        copied.parent.mkdir(parents=True, exist_ok=True)
        opened = copied.with_name(copied.name + ".lock").open("w")
    except OSError as error:
        raise _takes_none(url, copied, error) from error
    with opened as lock:
        size, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                now_size = -1
                with contextlib.suppress(FileNotFoundError):  # it is done, or has not begun
                    now_size = _part(copied).stat().st_size
                if now_size != size:
                    size, since = now_size, time.monotonic()
                if wait is None or copied.exists() or time.monotonic() - since > wait:
                    yield False
                    return
                time.sleep(POLL_S)
                continue
            yield True
            return
