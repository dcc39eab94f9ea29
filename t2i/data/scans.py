"""Indexes of local shards that have none beside them, kept in the user's cache, so that only the first start scans."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path

from t2i.data.index import SUFFIX, ShardIndex, is_settled
from t2i.data.sources import is_local, local_path
from t2i.errors import DataError
from t2i.files import user_cache, written_whole

log = logging.getLogger(__name__)

KEPT_DAYS = 60  # after its last use


def scans_folder() -> Path:
    return user_cache() / "indexes"


def kept_scan(url: str, file: int) -> ShardIndex | None:
    """The index that `keep_scan` wrote for this file, as it is now; None where there is none that can be read.
    file: descriptor of the open shard"""
    if not is_local(url):
        return None
    try:
        place = _place(url, file)
        index = ShardIndex.from_bytes(place.read_bytes(), str(place))
        os.utime(place)  # what is used stays
    except (OSError, DataError):
        return None
    return index


def keep_scan(url: str, file: int, index: ShardIndex) -> None:
    """Keeps the index of a shard; where the shard is a moment old or a copy, which may be gone by then, or the disk
    takes none, the next start scans again."""
    if not is_local(url) or not is_settled(os.fstat(file)):
        return
    try:
        with written_whole(_place(url, file)) as unfinished:
            unfinished.write_bytes(index.to_bytes())
    except OSError as error:
        log.debug("the scan of %s is not kept: %s", url, error)


def forget_unused() -> None:
    """Removes what no start has used for KEPT_DAYS."""
    try:
        for place in scans_folder().iterdir():
            if time.time() - place.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                place.unlink(missing_ok=True)
    except OSError as error:  # another process removes it, too
        log.debug("%s", error)


def _place(url: str, file: int) -> Path:
    """A name for the shard as it is: its path, size and time of its last change."""
    found = os.fstat(file)
    known_by = f"{local_path(url).absolute()}\0{found.st_size}\0{found.st_mtime_ns}"
    digest = hashlib.sha256(known_by.encode("utf-8", "surrogateescape")).hexdigest()
    return scans_folder() / f"{digest[:32]}{SUFFIX}"
