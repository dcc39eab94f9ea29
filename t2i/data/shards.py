"""The shards of one dataset: how many samples each has to give, and their bytes.

Sizes are known at the start, so that the order of samples can be; where the samples lie in a shard is looked up when it
is opened. Both come from `t2i data index`, if it was run: `index.json` in the folder (all sizes in one read) and
`00000.index.npz` beside each shard. Else a local shard is scanned; of a remote one, the number of samples is taken from
img2dataset's `00000_stats.json`, and where that is absent too, the shard is copied and scanned.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from t2i.data import sources
from t2i.data.decode import BadSample
from t2i.data.index import SUFFIX, ShardIndex
from t2i.data.selection import Listed, listed
from t2i.data.sources import SourceError, within
from t2i.data.store import ShardStore, read_ahead
from t2i.errors import DataError

log = logging.getLogger(__name__)

SUMMARY = "index.json"
RETRY_S = 300.0  # a shard that could not be read is tried again after this
REMOTE_LOOKUPS = 32  # at a time


@dataclass
class Opened:
    """An open shard. rows: of its index, those that belong to the dataset, in order; -1 where one is not there.
    file: closed when nobody holds it any more, so that a read that comes too late reads nothing else"""

    index: ShardIndex
    rows: np.ndarray
    file: IO[bytes] | None
    failure: BadSample | None = None
    since_s: float = 0.0


@dataclass(frozen=True)
class Raw:
    """The bytes of one sample, by extension.

    key: unique among the shards; key_in_shard: as the shard has it
    """

    key: str
    key_in_shard: str
    members: dict[str, bytes]


class Shards:
    """Opens the shards that a configuration names, and reads samples of them by (shard, place in it).

    shards: paths, URLs, pipes, or selections (.arrow)
    key: the configuration key that errors name
    keep_open: shards open at a time
    max_bad_share: more shards than this missing or unreadable at the start are an error; up to this share each counts
        as one bad sample an epoch, if its size cannot be known
    Raises DataError.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        store: ShardStore,
        key: str = "data.shards",
        keep_open: int = 64,
        max_bad_share: float = 0.0,
    ) -> None:
        self.store, self.key, self.keep_open = store, key, keep_open
        self.listed: list[Listed] = listed(sources.expand(shards, key))
        self._indexes: dict[int, ShardIndex] = {}  # of shards that have none beside them
        self._rows: dict[int, np.ndarray] = {}  # where samples were left out
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._warned: set[int] = set()
        stems = [PurePosixPath(each.url).stem for each in self.listed]
        self._distinct = len(set(stems)) == len(stems) and len({len(stem) for stem in stems}) == 1
        self._stems = stems
        self.sizes = self._find_sizes(max_bad_share)

    def __len__(self) -> int:
        return len(self.listed)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # open files do not travel to another process

    def url(self, shard: int) -> str:
        return self.listed[shard].url

    def keep(self, wanted: Callable[[np.ndarray], np.ndarray]) -> None:
        """Leaves out samples by the size of their source picture.

        wanted: (n, 2) heights and widths in pixels, 0 where unknown -> (n,) bool. What the tar file itself lost is
            kept, to be counted. Looks into every shard that has no sizes in its index.
        """
        for shard in range(len(self)):
            if self.sizes[shard]:
                opened = self._opened(shard)
                if opened.failure is None:
                    keep = wanted(self.original_px(shard)) | self._lost(opened)
                    self._rows[shard] = opened.rows[keep]
                    opened.rows = self._rows[shard]
        self.sizes = np.array([len(self._rows.get(i, range(n))) for i, n in enumerate(self.sizes.tolist())])

    def original_px(self, shard: int) -> np.ndarray:
        """(n, 2) height and width of the source pictures of a shard's samples, 0 where unknown."""
        opened = self._opened(shard)
        if opened.failure is not None:
            return np.zeros((int(self.sizes[shard]), 2), dtype=np.int32)
        if opened.index.original_px is None:
            opened.index = opened.index.with_sizes(self.store.path(self.url(shard)))
            if shard in self._indexes:
                self._indexes[shard] = opened.index
        assert opened.index.original_px is not None
        there = opened.rows >= 0
        sizes = np.zeros((len(opened.rows), 2), dtype=np.int32)
        sizes[there] = opened.index.original_px[opened.rows[there]]
        return sizes

    def read(
        self, places: Sequence[tuple[int, int]], extensions: Sequence[str] | None = None
    ) -> list[Raw | BadSample]:
        """The samples at (shard, place in it), or why they cannot be read; of their members those in `extensions`
        where that is given. Waits no longer than the deadline for the reads of one call."""
        opened = {shard: self._opened(shard) for shard, _ in places}
        answers: list[Raw | BadSample] = []

        def read_on() -> None:
            for shard, place in places[len(answers) :]:
                answers.append(self._read_one(shard, place, opened[shard], extensions))

        while len(answers) < len(places):
            try:
                within(self.store.limits.deadline_s, read_on)
            except TimeoutError as error:
                shard = places[len(answers)][0]
                self._fail(shard, "unreadable", str(error))
                answers, opened = (
                    list(answers),
                    opened | {shard: self._open[shard]},
                )  # the late reader keeps the old
        return answers

    def prefetch(self, shard: int) -> None:
        """Begins to bring a shard closer."""
        if shard not in self._open:
            self.store.prefetch(self.url(shard))

    def _read_one(
        self, shard: int, place: int, opened: Opened, extensions: Sequence[str] | None
    ) -> Raw | BadSample:
        if opened.failure is not None:
            name = f"{self._stems[shard]}[{place}]"
            return BadSample(opened.failure.cause, name, str(opened.failure))
        row = int(opened.rows[place]) if place < len(opened.rows) else -1
        if row < 0:
            cause = "truncated" if "truncated" in opened.index.flaws.values() else "missing"
            name = self.listed[shard].key(place) or f"{self._stems[shard]}[{place}]"
            return BadSample(cause, name, f"not in {self.url(shard)}")
        key_in_shard = opened.index.keys[row]
        key = self._prefix(shard, key_in_shard) + key_in_shard
        if flaw := opened.index.flaws.get(row):
            return BadSample(flaw, key, self.url(shard))
        try:
            assert opened.file is not None
            return Raw(key, key_in_shard, opened.index.read(opened.file.fileno(), row, extensions))
        except OSError as error:
            return BadSample("unreadable", key, f"{self.url(shard)}: {error}")

    def _prefix(self, shard: int, key_in_shard: str) -> str:
        """What makes a key unique where another shard may have the same: nothing for img2dataset's, which start with
        the shard's number."""
        if len(self) == 1 or (self._distinct and key_in_shard.startswith(self._stems[shard])):
            return ""
        return f"{self._stems[shard] if self._distinct else shard}:"

    def _lost(self, opened: Opened) -> np.ndarray:
        return (opened.rows < 0) | np.isin(opened.rows, list(opened.index.flaws))

    def _opened(self, shard: int) -> Opened:
        found = self._open.get(shard)
        if found is not None and (found.failure is None or time.monotonic() - found.since_s < RETRY_S):
            self._open.move_to_end(shard)
            return found
        try:
            self._open[shard] = self._open_now(shard)
        except FileNotFoundError as error:
            self._fail(shard, "missing", str(error))
        except SourceError as error:
            self._fail(shard, "missing" if error.missing else "unreadable", str(error))
        except (DataError, OSError) as error:
            self._fail(shard, "damaged" if isinstance(error, DataError) else "unreadable", str(error))
        while len(self._open) > self.keep_open:
            self._open.popitem(last=False)
        return self._open[shard]

    def _open_now(self, shard: int) -> Opened:
        url = self.url(shard)
        path = self.store.path(url)
        file = within(self.store.limits.deadline_s, lambda: path.open("rb", buffering=0))
        read_ahead(file)
        index = self._indexes.get(shard) or index_beside(url, self.store)
        if index is None or index.file_bytes != os.fstat(file.fileno()).st_size:
            if index is not None and shard not in self._warned:
                self._warned.add(shard)
                log.warning("%s has changed since it was indexed: `t2i data index` again", url)
            index = ShardIndex.scan(path)
        rows = self._rows.get(shard)
        if rows is None:
            rows = self.listed[shard].rows(index)
            if len(rows) > self.sizes[shard] and shard not in self._warned:
                self._warned.add(shard)
                more = len(rows) - int(self.sizes[shard])
                log.warning("%s holds %d samples more than it is listed with: they are not read", url, more)
        return Opened(index, rows, file)

    def _fail(self, shard: int, cause: str, detail: str) -> None:
        failure = BadSample(cause, self._stems[shard], detail)
        self._open[shard] = Opened(_NOTHING, np.empty(0, dtype=np.int64), None, failure, time.monotonic())

    def _find_sizes(self, max_bad_share: float) -> np.ndarray:
        """(n,) int64 samples per shard."""
        summaries = lru_cache(maxsize=None)(partial(_summary, limits=self.store.limits))
        limits = self.store.limits
        sizes = np.zeros(len(self.listed), dtype=np.int64)
        unknown = []
        for shard, each in enumerate(self.listed):
            folder, _, name = each.url.rpartition("/")
            if each.keys is not None:
                sizes[shard] = len(each.keys)
            elif (entry := summaries(folder).get(name)) is not None and _is_current(each.url, entry, limits):
                sizes[shard] = entry["samples"]
            else:
                unknown.append(shard)
        failed: list[tuple[int, Exception]] = []
        with ThreadPoolExecutor(REMOTE_LOOKUPS) as pool:
            remote = [shard for shard in unknown if not sources.is_local(self.url(shard))]
            answers = dict(zip(remote, pool.map(self._remote_size, remote), strict=True))
        to_scan = [shard for shard in unknown if answers.get(shard) is None]
        said = False
        for shard in unknown:
            try:
                size = answers.get(shard)
                if size is None:
                    if not said and index_beside(self.url(shard), self.store) is None:
                        said = True
                        log.info(
                            "scanning up to %d shards that have no index; `t2i data index` makes this instant",
                            len(to_scan),
                        )
                    size = self._scanned_size(shard)
                sizes[shard] = size
            except (DataError, OSError) as error:
                failed.append((shard, error))
                sizes[shard] = 1
        if failed and len(failed) > max_bad_share * len(self.listed):
            raise self._refusal(failed)
        for _, failure in failed:
            log.warning("%s It counts as one bad sample an epoch.", failure)
        return sizes

    def _refusal(self, failed: list[tuple[int, Exception]]) -> DataError:
        shard, error = failed[0]
        if isinstance(error, SourceError) and error.missing:
            said = f"{self.key} names {self.url(shard)}, which does not exist"
        else:
            said = f"{self.key} names {self.url(shard)}, which cannot be read: {str(error).rstrip('.')}"
        if len(failed) > 1:
            said += f" ({len(failed)} of {len(self.listed)} shards are like that)"
        return DataError(said + ".")

    def _remote_size(self, shard: int) -> int | None:
        """By the index or the statistics beside a remote shard; None where there are none."""
        url = self.url(shard)
        index = index_beside(url, self.store)
        return len(index) if index is not None else _successes(url, self.store)

    def _scanned_size(self, shard: int) -> int:
        """Raises SourceError, DataError or OSError."""
        url = self.url(shard)
        path = self.store.path(url)
        if not path.is_file():
            raise SourceError(url, "", missing=True)
        index = index_beside(url, self.store)
        if index is None or index.file_bytes != path.stat().st_size:
            index = self._indexes[shard] = ShardIndex.scan(path)
        return samples_in(index, url, self.store)


_NOTHING = ShardIndex([], (), np.empty((0, 0), np.int64), np.empty((0, 0), np.int64), {}, 0)


def index_beside(url: str, store: ShardStore) -> ShardIndex | None:
    """The index that `t2i data index` wrote beside a shard; None where there is none."""
    place = sources.beside(url, SUFFIX)
    if not place:
        return None
    try:
        return ShardIndex.from_bytes(sources.read_bytes(place, store.limits), place)
    except SourceError as error:
        if not error.missing:
            log.warning("%s", error)
        return None


def samples_in(index: ShardIndex, url: str, store: ShardStore) -> int:
    """Samples of a shard; where the tar file lost some, as many as img2dataset's statistics say that there were."""
    lost = _successes(url, store) if index.flaws else None
    return max(len(index), lost or 0)


def _successes(url: str, store: ShardStore) -> int | None:
    """Samples in a shard by img2dataset's statistics beside it."""
    place = sources.beside(url, "_stats.json")
    try:
        found = json.loads(sources.read_bytes(place, store.limits))["successes"] if place else None
    except (SourceError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found >= 0 else None


def _summary(folder: str, limits: sources.Limits) -> dict[str, dict[str, int]]:
    """What the folder's index.json says of its shards, by name; {} where there is none."""
    place = f"{folder}/{SUMMARY}" if folder else SUMMARY
    if folder.startswith("pipe:"):
        return {}
    try:
        shards = json.loads(sources.read_bytes(place, limits))["shards"]
        return {
            name: {key: int(entry[key]) for key in ("samples", "bytes")} for name, entry in shards.items()
        }
    except SourceError as error:
        if not error.missing:
            log.warning("%s", error)
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}  # somebody else's index.json


def _is_current(url: str, entry: dict[str, int], limits: sources.Limits) -> bool:
    """Whether a shard has the size it was indexed with; of a remote one, or one that is gone, that shows later."""
    if not sources.is_local(url):
        return True
    try:
        return sources.size(url, limits) == entry["bytes"]
    except SourceError as error:
        return error.missing
