"""Shards that are open, and those that could not be opened lately."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Generic, TypeVar

import numpy as np

from t2i.data import sources
from t2i.data.decode import BadSample
from t2i.data.index import SUFFIX, ShardIndex
from t2i.data.layout import Layout
from t2i.data.mapped import Mapped, map_file
from t2i.data.scans import keep_scan, kept_scan
from t2i.data.sources import SourceError, within
from t2i.data.store import ShardStore, read_ahead
from t2i.errors import DataError

log = logging.getLogger(__name__)

RETRY_S = 300.0  # a shard that could not be read is tried again after this
SCAN_DEADLINES = 10  # a scan is many small reads, and may take this many times the deadline of one
Key = TypeVar("Key", int, str)


@dataclass
class Opened:
    """An open shard. rows: of its index, those that belong to the dataset, in order; -1 where one is not there.
    file: closed when nobody holds it any more, so that a read that comes too late reads nothing else
    prefix: what makes its keys unique among the shards, but for those that begin with `bare`, which are as they are
    whole: its bytes, where they are mapped"""

    index: ShardIndex
    rows: np.ndarray
    file: IO[bytes] | None
    failure: BadSample | None = None
    since_s: float = 0.0
    prefix: str = ""
    bare: str | tuple[str, ...] = ""
    whole: Mapped | None = None
    layout: Layout | None = None

    def laid_out(self, endings: tuple[str, ...] | None, deadline_s: float) -> Layout:
        """Where the members lie that `endings` mean. To be asked for each batch: a shard that has changed since it was
        mapped is read sample by sample from then on."""
        if self.layout is None and self.whole is None:
            self.map(deadline_s)
        elif self.whole is not None and not self.whole.holds():
            self.whole = self.layout = None
        if self.layout is None or self.layout.endings is not endings:
            file = -1 if self.file is None else self.file.fileno()
            self.layout = Layout(file, self.index, self.rows, endings, self.prefix, self.bare, self.whole)
        return self.layout

    def map(self, deadline_s: float, ahead: bool = False) -> None:
        """See `map_file`."""
        if self.file is not None:
            self.whole = map_file(self.file.fileno(), deadline_s, ahead)


class OpenShards(Generic[Key]):
    """At most `keep` open shards; the one least recently asked for is closed first. What cannot be opened is left
    alone for RETRY_S."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._open: OrderedDict[Key, Opened] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # open files do not travel to another process

    def __contains__(self, key: Key) -> bool:
        return key in self._open

    def get(self, key: Key) -> Opened | None:
        """The shard, or why it could not be opened; None where it is to be opened."""
        found = self._open.get(key)
        if found is None or (found.failure is not None and time.monotonic() - found.since_s >= RETRY_S):
            return None
        self._open.move_to_end(key)
        return found

    def open(self, key: Key, name: Callable[[], str], open_now: Callable[[], Opened]) -> Opened:
        """The shard, opened now, or why that could not be done. name: for the sample that such a failure is counted
        as"""
        try:
            return self._keep(key, open_now())
        except SourceError as error:
            return self.fail(key, name(), "missing" if error.missing else "unreadable", str(error))
        except DataError as error:
            return self.fail(key, name(), "damaged", str(error))
        except OSError as error:
            return self.fail(key, name(), "unreadable", str(error))

    def close(self) -> None:
        """Closes what is open; what could not be opened is still left alone."""
        self._open = OrderedDict((key, each) for key, each in self._open.items() if each.failure is not None)

    def fail(self, key: Key, name: str, cause: str, detail: str) -> Opened:
        """From now on for a while the shard counts as one that cannot be opened."""
        failure = BadSample(cause, name, detail)
        nothing = np.empty((0, 0), dtype=np.int64)
        index = ShardIndex([], (), nothing, nothing, {}, 0)
        return self._keep(key, Opened(index, nothing.ravel(), None, failure, time.monotonic()))

    def _keep(self, key: Key, opened: Opened) -> Opened:
        self._open.pop(key, None)
        self._open[key] = opened
        while len(self._open) > self.keep:
            self._open.popitem(last=False)
        return opened


@dataclass
class Indexed:
    """An open shard with an index that fits it. outdated: an index was known, or lay beside it, and does not fit
    scanned: it took a scan, no index and no kept scan was there"""

    file: IO[bytes]
    index: ShardIndex
    outdated: bool = False
    scanned: bool = False


def open_indexed(url: str, store: ShardStore, known: ShardIndex | None = None, look: bool = True) -> Indexed:
    """look: for an index beside the shard, where none is known. Raises SourceError, DataError or OSError."""
    file = store.open_tar(url)
    read_ahead(file)
    descriptor, deadline_s = file.fileno(), store.limits.deadline_s
    index = index_beside(url, store) if known is None and look else known
    if index is not None and within(deadline_s, lambda: index.fits(descriptor)):
        return Indexed(file, index)
    kept = within(deadline_s, lambda: kept_scan(url, descriptor))
    if kept is not None and kept.fits(descriptor):
        return Indexed(file, kept, outdated=index is not None)
    scanned = within(SCAN_DEADLINES * deadline_s, lambda: ShardIndex.scan(url, descriptor))
    keep_scan(url, descriptor, scanned)
    return Indexed(file, scanned, outdated=index is not None, scanned=True)


def index_beside(url: str, store: ShardStore) -> ShardIndex | None:
    """The index that `t2i data index` wrote beside a shard; None where there is none that can be read."""
    place = sources.beside(url, SUFFIX)
    if not place:
        return None
    try:
        return ShardIndex.from_bytes(sources.read_bytes(place, store.limits), place)
    except DataError as error:
        if not (isinstance(error, SourceError) and error.missing):
            # An older version may have made thousands of them.
            log.log(logging.DEBUG if store.told_of_index else logging.WARNING, "%s", error)
            store.told_of_index = True
        return None
