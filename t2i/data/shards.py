"""The shards of one dataset: how many samples each has to give, and their bytes.

Sizes are known at the start, so that the order of samples can be; where the samples lie in a shard is looked up when it
is opened. Both come from `t2i data index`, if it was run: `index.json` in the folder (all sizes in one read) and
`00000.index.npz` beside each shard. Else a local shard is scanned, once for all starts (see scans.py); of a remote one,
the number of samples is taken from img2dataset's `00000_stats.json`, and where that is absent too, the shard is copied
and scanned.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import PurePosixPath

import numpy as np

from t2i.data import sources
from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.data.opened import Opened, OpenShards, index_beside, open_indexed
from t2i.data.scans import forget_unused, keep_scan
from t2i.data.selection import Listed, listed
from t2i.data.sources import SourceError, within
from t2i.data.store import ShardStore
from t2i.errors import DataError

log = logging.getLogger(__name__)

SUMMARY = "index.json"
REMOTE_LOOKUPS = 32  # at a time
SCANNING = "scanning shards that have no index, at their first use; `t2i data index` does it for everybody"
OUTDATED = "{} has changed since it was indexed: `t2i data index` again"
MAX_SAMPLES = 10**7  # of a shard; who claims more is not believed


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
        as the bad samples that its statistics promise, or as one an epoch
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
        self.store, self.key = store, key
        self.listed: list[Listed] = listed(sources.expand(shards, key))
        self._indexes: dict[int, ShardIndex] = {}  # of shards that have none beside them
        self._rows: dict[int, np.ndarray] = {}  # where samples were left out
        self._open = OpenShards[int](keep_open)
        self._prefetched: set[int] = set()  # and not opened since
        self._said: set[str] = set()
        stems = [PurePosixPath(sources.split_query(each.url)[0]).stem for each in self.listed]
        self._distinct = len(set(stems)) == len(stems) and len({len(stem) for stem in stems}) == 1
        self._stems = stems
        self.sizes = self._find_sizes(max_bad_share)

    def __len__(self) -> int:
        return len(self.listed)

    def url(self, shard: int) -> str:
        return self.listed[shard].url

    def keep(self, wanted: Callable[[np.ndarray], np.ndarray]) -> None:
        """Leaves out samples by the size of their source picture.

        wanted: (n, 2) heights and widths in pixels, 0 where unknown -> (n,) bool. What the tar file itself lost is
            kept, to be counted. Looks into every shard that has no sizes in its index.
        """
        for shard in range(len(self)):
            if self.sizes[shard]:
                sizes = self.original_px(shard)
                opened = self._opened(shard)
                if opened.failure is None:
                    keep = wanted(sizes) | self._lost(opened)
                    self._rows[shard] = opened.rows = opened.rows[keep]
                    self.sizes[shard] = len(opened.rows)

    def original_px(self, shard: int) -> np.ndarray:
        """(n, 2) height and width of the source pictures of a shard's samples, 0 where unknown."""
        opened = self._opened(shard)
        sizes = np.zeros((int(self.sizes[shard]), 2), dtype=np.int32)
        if opened.file is None:
            return sizes
        if opened.index.original_px is None:
            opened.index = opened.index.with_sizes(opened.file.fileno())
            keep_scan(self.url(shard), opened.file.fileno(), opened.index)
            if shard in self._indexes:
                self._indexes[shard] = opened.index
        assert opened.index.original_px is not None
        there = opened.rows >= 0
        sizes[there] = opened.index.original_px[opened.rows[there]]
        return sizes

    def read(
        self, places: Sequence[tuple[int, int]], endings: Sequence[str] | None = None
    ) -> list[Raw | BadSample]:
        """The samples at (shard, place in it), or why they cannot be read; of their members those meant by
        `endings` where that is given. A shard that is silent for the deadline counts as unreadable."""
        opened = {shard: self._opened(shard) for shard in dict.fromkeys(shard for shard, _ in places)}
        answers: list[Raw | BadSample] = []
        while len(answers) < len(places):
            rest = [(shard, place, opened[shard]) for shard, place in places[len(answers) :]]
            came: list[Raw | BadSample] = []

            # Holds on to its own lists: where it comes too late, what it adds to them is not looked at any more.
            def read_on(
                rest: list[tuple[int, int, Opened]] = rest, came: list[Raw | BadSample] = came
            ) -> None:
                for at in rest:
                    came.append(self._read_one(*at, endings))

            try:
                within(self.store.limits.deadline_s, read_on)
            except TimeoutError as error:
                came = came[:]
                if len(came) < len(rest):
                    shard = rest[len(came)][0]
                    opened[shard] = self._open.fail(shard, self._stems[shard], "unreadable", str(error))
            answers += came
        return answers

    def prefetch(self, shard: int) -> None:
        """Begins to bring a shard closer, once until it is opened."""
        if shard not in self._open and shard not in self._prefetched:
            self._prefetched.add(shard)
            self.store.prefetch(self.url(shard))

    def _read_one(
        self, shard: int, place: int, opened: Opened, endings: Sequence[str] | None
    ) -> Raw | BadSample:
        if opened.failure is not None:
            name = f"{self._stems[shard]}[{place}]"
            return BadSample(opened.failure.cause, name, str(opened.failure))
        row = int(opened.rows[place])
        if row < 0:
            cause = "truncated" if "truncated" in opened.index.flaws.values() else "missing"
            name = self.listed[shard].key(place) or f"{self._stems[shard]}[{place}]"
            listed = f"which is listed with {self.sizes[shard]} samples"
            return BadSample(cause, name, f"not in {self.url(shard)}, {listed}")
        key_in_shard = opened.index.keys[row]
        key = self._prefix(shard, key_in_shard) + key_in_shard
        if flaw := opened.index.flaws.get(row):
            return BadSample(flaw, key, self.url(shard))
        try:
            assert opened.file is not None
            return Raw(key, key_in_shard, opened.index.read(opened.file.fileno(), row, endings))
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
        return self._open.get(shard, self._stems[shard], lambda: self._open_now(shard))

    def _open_now(self, shard: int) -> Opened:
        self._prefetched.discard(shard)
        url, size = self.url(shard), int(self.sizes[shard])
        found = open_indexed(url, self.store, self._indexes.get(shard))
        index = found.index
        if found.outdated:
            self._say_once(logging.WARNING, OUTDATED.format(url))
        rows = self._rows.get(shard)
        if rows is None:
            rows = self.listed[shard].rows(index)
        if len(rows) > size:
            more = len(rows) - size
            self._say_once(
                logging.WARNING, f"{url} holds {more} samples more than it is listed with: they are not read"
            )
        lost = np.full(max(0, size - len(rows)), -1, dtype=np.int64)
        rows = np.concatenate([rows[:size], lost])
        return Opened(index, np.where(rows < len(index), rows, -1), found.file)

    def _say_once(self, level: int, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.log(level, "%s", message)

    def _find_sizes(self, max_bad_share: float) -> np.ndarray:
        """(n,) int64 samples per shard."""
        summaries = lru_cache(maxsize=None)(partial(_summary, limits=self.store.limits))
        limits = self.store.limits
        sizes = np.zeros(len(self.listed), dtype=np.int64)
        unknown = []
        for shard, each in enumerate(self.listed):
            folder, slash, name = each.url.rpartition("/")
            alone = each.url.startswith("pipe:") or sources.split_query(each.url)[1]  # no folder to look into
            place = "" if alone else folder + slash + SUMMARY
            if each.keys is not None:
                sizes[shard] = len(each.keys)
            elif (entry := summaries(place).get(name)) is not None and _is_current(each.url, entry, limits):
                sizes[shard] = entry["samples"]
            else:
                unknown.append(shard)

        def size_of(shard: int) -> int | DataError | OSError:
            try:
                return self._size(shard)
            except (DataError, OSError) as error:
                return error

        remote = [shard for shard in unknown if not sources.is_local(self.url(shard))]
        with ThreadPoolExecutor(REMOTE_LOOKUPS) as pool:
            found = dict(zip(remote, pool.map(size_of, remote), strict=True))
        failed: list[tuple[int, Exception]] = []
        for shard in unknown:
            size = found[shard] if shard in found else size_of(shard)
            if isinstance(size, Exception):
                failed.append((shard, size))
                promised = None if shard in found else _successes(self.url(shard), self.store)
                sizes[shard] = promised or 1
            else:
                sizes[shard] = size
        if self._indexes:
            forget_unused()
        if failed and len(failed) > max_bad_share * len(self.listed):
            raise self._refusal(failed)
        for shard, failure in failed:
            log.warning("%s Bad samples an epoch for that: %d.", failure, sizes[shard])
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

    def _size(self, shard: int) -> int:
        """By the index or else, of a remote shard, by the statistics beside it, and by a scan where there is neither.
        Raises SourceError, DataError or OSError."""
        url = self.url(shard)
        index = index_beside(url, self.store)
        if not sources.is_local(url):
            size = _successes(url, self.store) if index is None else samples_in(index, url, self.store)
            if size is not None:
                return size
        found = open_indexed(url, self.store, index, look=False)
        found.file.close()
        if found.scanned:
            self._say_once(logging.INFO, SCANNING)
        if found.outdated:
            self._say_once(logging.WARNING, OUTDATED.format(url))
        if found.index is not index:
            self._indexes[shard] = found.index
        return samples_in(found.index, url, self.store)


def samples_in(index: ShardIndex, url: str, store: ShardStore) -> int:
    """Samples of a shard; as many as img2dataset's statistics say that there were, if the tar file has fewer: a tar
    file that ends too early at the right byte looks whole."""
    return max(len(index), _successes(url, store) or 0)


def _successes(url: str, store: ShardStore) -> int | None:
    """Samples in a shard by img2dataset's statistics beside it."""
    place = sources.beside(url, "_stats.json")
    try:
        found = json.loads(sources.read_bytes(place, store.limits))["successes"] if place else None
    except (SourceError, ValueError, KeyError, TypeError, RecursionError):
        return None
    known = isinstance(found, int) and not isinstance(found, bool) and 0 <= found <= MAX_SAMPLES
    return found if known else None


def _summary(place: str, limits: sources.Limits) -> dict[str, dict[str, int]]:
    """What the index.json at `place` says of its folder's shards, by name; {} where there is none."""
    if not place:
        return {}
    try:
        shards = json.loads(sources.read_bytes(place, limits))["shards"]
        return {
            name: {key: int(entry[key]) for key in ("samples", "bytes")}
            for name, entry in shards.items()
            if 0 <= int(entry["samples"]) <= MAX_SAMPLES
        }
    except SourceError as error:
        if not error.missing:
            log.warning("%s", error)
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}  # somebody else's index.json


def _is_current(url: str, entry: dict[str, int], limits: sources.Limits) -> bool:
    """Whether a shard has the size it was indexed with; of a remote one, or one that is gone, that shows later."""
    if not sources.is_local(url):
        return True
    try:
        return sources.size(url, limits) == entry["bytes"]
    except SourceError as error:
        return error.missing
