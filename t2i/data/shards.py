"""The shards of one dataset: how many samples each has to give, and their bytes.

Sizes are known at the start, so that the order of samples can be; where the samples lie in a shard is looked up when it
is opened. Both come from `t2i data index`, if it was run: `index.json` in the folder (of all shards in one read, see
folder_index.py) and `00000.index.npz` beside each shard. Else a local shard is scanned, once for all starts (see
scans.py); of a remote one, the number of samples is taken from img2dataset's `00000_stats.json`, and where that is
absent too, the shard is copied and scanned.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np

from t2i.data import sources
from t2i.data.ahead import Ahead
from t2i.data.decode import BadSample
from t2i.data.folder_index import SUMMARY, FolderIndex, as_stored, open_sizes, read_folder_index
from t2i.data.index import ShardIndex
from t2i.data.layout import Raw
from t2i.data.opened import SCAN_DEADLINES, Opened, OpenShards, index_beside, open_indexed
from t2i.data.scans import forget_unused, keep_scan
from t2i.data.selection import Listed, listed
from t2i.data.sources import SourceError, within
from t2i.data.statistics import samples_in, successes
from t2i.data.store import ShardStore
from t2i.errors import DataError
from t2i.few import FewOfEach, plural

log = logging.getLogger(__name__)

REMOTE_LOOKUPS = 32  # at a time
SAMPLES_LOOKED_AT = 2**20  # at a time
SCANNING = "scanning shards that have no index, at their first use; `t2i data index` does it for everybody"
OUTDATED = "{} has changed since it was indexed: `t2i data index` again"
NO_SIZES = "{} does not have the sizes of pictures: `t2i data index` again, and the start is quick"


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
        self._min_original_px = 0  # samples whose picture is known to be smaller are left out
        self._open = OpenShards[int](keep_open)
        self._ahead = Ahead[int, Opened | None]()
        self._say = FewOfEach(log)
        stems = {_stem(each.url) for each in self.listed}
        self._distinct = len(stems) == len(self.listed) and len(set(map(len, stems))) == 1
        self._folders: list[FolderIndex] = []
        self._folder = np.full(
            len(self.listed), -1
        )  # of each shard, of those that know the sizes of its pictures
        self._row = np.full(len(self.listed), -1)  # of it, the shard's row
        self.sizes = self._find_sizes(max_bad_share)
        self._listed_sizes = self.sizes.copy()  # before any are left out

    def __len__(self) -> int:
        return len(self.listed)

    def url(self, shard: int) -> str:
        return self.listed[shard].url

    def keep(self, min_original_px: int) -> int:
        """Leaves out samples whose source picture is known to have a shorter side than that; what the tar file itself
        lost is kept, to be counted. Returns the longest shorter side of all.

        Looks into every shard of which neither the folder's index nor its own knows the sizes.
        """
        largest = 0
        for first, stop, sizes, lost in self._looked_at():
            largest = max(largest, int(sizes.min(axis=1).max(initial=0)))
            kept = np.cumsum(np.append(0, _large_enough(sizes, min_original_px) | lost))
            edges = np.cumsum(np.append(0, self._listed_sizes[first:stop]))
            self.sizes[first:stop] = np.diff(kept[edges])
        self._min_original_px = min_original_px
        self._open.close()  # they are opened again without what is left out
        self._ahead.clear()
        return largest

    def original_px(self) -> Iterator[np.ndarray]:
        """(n, 2) uint16 height and width of the source pictures of all samples, 0 where unknown; in pieces, in the
        order of the samples."""
        for _, _, sizes, lost in self._looked_at():
            yield sizes[_large_enough(sizes, self._min_original_px) | lost]

    def _looked_at(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """From which shard up to which, (n, 2) the sizes of all their pictures, and (n,) which samples the tar file
        lost."""
        for each in self._folders:
            if len(each.samples) and not each.sizes:
                self._say(logging.WARNING, "folders without sizes", NO_SIZES.format(each.place))
        files = [open_sizes(each, self.store) if each.sizes else None for each in self._folders]
        known = self._folder >= 0
        if not all(files):
            known &= np.isin(self._folder, [i for i, file in enumerate(files) if file is not None])
        group = np.where(known, self._folder, -1)
        piece = (np.cumsum(self._listed_sizes) - self._listed_sizes) // SAMPLES_LOOKED_AT
        piece[~known] = np.flatnonzero(~known) // (2 * REMOTE_LOOKUPS)
        starts = (np.diff(group, prepend=-2) != 0) | (np.diff(piece, prepend=-1) != 0)
        edges = [*np.flatnonzero(starts).tolist(), len(self)]
        for first, stop in itertools.pairwise(edges):
            number = int(group[first])
            file = files[number] if number >= 0 else None
            if file is None:
                yield from self._asked(first, stop)
                continue
            folder, rows = self._folders[number], self._row[first:stop]
            sizes = file.read(folder.first[rows], folder.samples[rows])
            lost = np.zeros(len(sizes), dtype=bool)
            if folder.flawed:
                begins = np.cumsum(self._listed_sizes[first:stop]) - self._listed_sizes[first:stop]
                for row, begin, size in zip(
                    rows.tolist(), begins, self._listed_sizes[first:stop], strict=True
                ):
                    lost[[begin + place for place in folder.flawed.get(row, ()) if 0 <= place < size]] = True
            yield first, stop, sizes, lost

    def _asked(self, first: int, stop: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """The same, shard by shard, of those that no folder's index knows."""
        shards = [shard for shard in range(first, stop) if self._listed_sizes[shard]]
        remote = [shard for shard in shards if not sources.is_local(self.url(shard))]
        with ThreadPoolExecutor(REMOTE_LOOKUPS) as pool:
            beside = pool.map(lambda shard: index_beside(self.url(shard), self.store), remote)
            indexes = dict(zip(remote, beside, strict=True)) | self._indexes
        for shard in shards:
            index = indexes.get(shard)
            if index is None or index.original_px is None:
                opened = self._opened(shard)
                if opened.file is None:
                    size = int(self._listed_sizes[shard])
                    yield shard, shard + 1, np.zeros((size, 2), np.uint16), np.ones(size, dtype=bool)
                    continue
                index = self._with_sizes(shard, opened.index, opened.file)
            yield shard, shard + 1, *_sizes_of(index, self._listed_rows(shard, index))

    def _with_sizes(self, shard: int, index: ShardIndex, file: IO[bytes]) -> ShardIndex:
        """The index with the sizes of its pictures, looked up now where nobody did."""
        if index.original_px is None:
            descriptor, deadline_s = file.fileno(), SCAN_DEADLINES * self.store.limits.deadline_s
            index = within(deadline_s, lambda: index.with_sizes(descriptor))
            keep_scan(self.url(shard), descriptor, index)
            self._indexes[shard] = index
        return index

    def read(
        self, places: Sequence[tuple[int, int]], endings: tuple[str, ...] | None = None
    ) -> list[Raw | BadSample]:
        """The samples at (shard, place in it), or why they cannot be read; of their members those meant by
        `endings` where that is given. A shard that is silent for the deadline counts as unreadable."""
        opened = {shard: self._opened(shard) for shard in dict.fromkeys(shard for shard, _ in places)}
        deadline_s = self.store.limits.deadline_s
        read = {shard: each.laid_out(endings, deadline_s).read for shard, each in opened.items()}
        answers: list[Raw | BadSample | None] = [read[shard](place) for shard, place in places]
        late = [i for i, answer in enumerate(answers) if answer is None]
        for i, answer in zip(late, self._wait_for([places[i] for i in late], opened, endings), strict=True):
            answers[i] = answer
        return answers  # type: ignore[return-value]

    def _wait_for(
        self, places: Sequence[tuple[int, int]], opened: dict[int, Opened], endings: tuple[str, ...] | None
    ) -> list[Raw | BadSample]:
        """What has to be waited for, or is to be counted."""
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
                    opened[shard] = self._open.fail(shard, _stem(self.url(shard)), "unreadable", str(error))
            answers += came
        return answers

    def picture_bytes(self, shard: int, place: int) -> int | None:
        """See `ShardIndex.picture_bytes`."""
        opened = self._opened(shard)
        return next((opened.index.picture_bytes(int(row)) for row in opened.rows[place : place + 1]), None)

    def prefetch(self, shard: int) -> None:
        """Begins to copy or to open a shard in the background; what goes wrong there comes up when it is asked for."""
        if shard not in self._open:
            self._ahead.begin(shard, lambda: self._bring(shard))

    def _bring(self, shard: int) -> Opened | None:
        if not sources.is_local(self.url(shard)):
            self.store.bring(self.url(shard))
            return None
        opened = self._open_now(shard)
        opened.map(self.store.limits.deadline_s, ahead=True)
        return opened

    def _read_one(
        self, shard: int, place: int, opened: Opened, endings: tuple[str, ...] | None
    ) -> Raw | BadSample:
        if opened.failure is not None:
            name = f"{_stem(self.url(shard))}[{place}]"
            return BadSample(opened.failure.cause, name, str(opened.failure))
        row = int(opened.rows[place])
        if row < 0:
            cause = "truncated" if "truncated" in opened.index.flaws.values() else "missing"
            name = self.listed[shard].key(place) or f"{_stem(self.url(shard))}[{place}]"
            listed = f"which is listed with {plural(int(self.sizes[shard]), 'sample')}"
            return BadSample(cause, name, f"not in {self.url(shard)}, {listed}")
        key_in_shard = opened.index.keys[row]
        if before := opened.index.repeated.get(row):  # else it would get what was encoded of the first
            key_in_shard += f"~{before + 1}"
        key = key_in_shard if key_in_shard.startswith(opened.bare) else opened.prefix + key_in_shard
        if flaw := opened.index.flaws.get(row):
            return BadSample(flaw, key, self.url(shard))
        try:
            assert opened.file is not None
            return Raw(key, key_in_shard, opened.index.read(opened.file.fileno(), row, endings))
        except OSError as error:
            return BadSample("unreadable", key, f"{self.url(shard)}: {error}")

    def _opened(self, shard: int) -> Opened:
        return self._open.get(shard) or self._open.open(
            shard,
            lambda: _stem(self.url(shard)),
            lambda: self._ahead.take(shard) or self._open_now(shard),
        )

    def _open_now(self, shard: int) -> Opened:
        url, size = self.url(shard), int(self.sizes[shard])
        found = open_indexed(url, self.store, self._indexes.get(shard))
        index = found.index
        if found.outdated:
            self._say(logging.WARNING, "shards that changed", OUTDATED.format(url))
        rows = self._listed_rows(shard, index)
        if self._min_original_px:
            index = self._with_sizes(shard, index, found.file)
            sizes, lost = _sizes_of(index, rows)
            rows = self._of_length(shard, rows[_large_enough(sizes, self._min_original_px) | lost], size)
        # img2dataset's keys start with the shard's number, and are unique as they are.
        stem = _stem(url)
        bare: str | tuple[str, ...] = "" if len(self) == 1 else (stem if self._distinct else ())
        return Opened(index, rows, found.file, prefix=f"{stem if self._distinct else shard}:", bare=bare)

    def _listed_rows(self, shard: int, index: ShardIndex) -> np.ndarray:
        """(n,) int64: the rows of the index that the shard is listed with, large or small; -1 for what is not there."""
        return self._of_length(shard, self.listed[shard].rows(index), int(self._listed_sizes[shard]))

    def _of_length(self, shard: int, rows: np.ndarray, size: int) -> np.ndarray:
        if len(rows) > size:
            more = len(rows) - size
            self._say(
                logging.WARNING,
                "shards that hold more",
                f"{self.url(shard)} holds {plural(more, 'sample')} more than it is listed with: not read",
            )
        return np.concatenate([rows[:size], np.full(max(0, size - len(rows)), -1, dtype=np.int64)])

    def _find_sizes(self, max_bad_share: float) -> np.ndarray:
        """(n,) int64 samples per shard."""
        sizes = np.zeros(len(self.listed), dtype=np.int64)
        unknown = self._find_indexed(sizes)

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
                promised = None if shard in found else successes(self.url(shard), self.store)
                sizes[shard] = promised or 1
            else:
                sizes[shard] = size
        if self._indexes:
            forget_unused()
        if failed and len(failed) > max_bad_share * len(self.listed):
            raise self._refusal(failed)
        for shard, failure in failed:
            message = f"{failure} Bad samples an epoch for that: {sizes[shard]}."
            self._say(logging.WARNING, "shards that cannot be read", message)
        return sizes

    def _find_indexed(self, sizes: np.ndarray) -> list[int]:
        """Fills in what selections and the indexes of folders say. Returns the other shards."""
        number_of: dict[str, int] = {}
        for shard, each in enumerate(self.listed):
            if each.keys is not None:
                sizes[shard] = len(each.keys)
                continue
            folder, slash, name = each.url.rpartition("/")
            alone = each.url.startswith("pipe:") or sources.split_query(each.url)[1]  # no folder to look into
            place = "" if alone else folder + slash + SUMMARY
            if place not in number_of:
                number_of[place] = len(self._folders)
                self._folders.append(read_folder_index(place, self.store.limits))
            self._folder[shard] = number_of[place]
            self._row[shard] = self._folders[number_of[place]].row_of.get(name, -1)
        for number, found in enumerate(self._folders):
            here = np.flatnonzero((self._folder == number) & (self._row >= 0))
            rows = self._row[here]
            if len(here) and sources.is_local(self.url(int(here[0]))):
                # Of a shard on a server, or one that is gone, it shows later.
                there = sources.sizes([self.url(shard) for shard in here.tolist()], self.store.limits)
                current = (there == found.bytes[rows]) | (there == sources.MISSING)
                self._row[here[~current]] = -1
                here, rows = here[current], rows[current]
            sizes[here] = found.samples[rows]
            self._folder[here[found.first[rows] < 0]] = -1
            found.row_of.clear()
        known = (self._row >= 0) | np.array([each.keys is not None for each in self.listed], dtype=bool)
        self._folder[self._row < 0] = -1
        return np.flatnonzero(~known).tolist()

    def _refusal(self, failed: list[tuple[int, Exception]]) -> DataError:
        shard, error = failed[0]
        if isinstance(error, SourceError) and error.missing:
            said = f"{self.key} names {self.url(shard)}, which does not exist"
        else:
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            said = f"{self.key} names {self.url(shard)}, which cannot be read: {reason}"
        if len(failed) > 1:
            said += f" ({len(failed)} of {len(self.listed)} shards are like that)"
        return DataError(said + ".")

    def _size(self, shard: int) -> int:
        """By the index or else, of a remote shard, by the statistics beside it, and by a scan where there is neither.
        Raises SourceError, DataError or OSError."""
        url = self.url(shard)
        index = index_beside(url, self.store)
        if not sources.is_local(url):
            size = successes(url, self.store) if index is None else samples_in(index, url, self.store)
            if size is not None:
                return size
        found = open_indexed(url, self.store, index, look=False)
        found.file.close()
        if found.scanned:
            self._say(logging.INFO, "scanning", SCANNING)
        if found.outdated:
            self._say(logging.WARNING, "shards that changed", OUTDATED.format(url))
        if found.index is not index:
            self._indexes[shard] = found.index
        return samples_in(found.index, url, self.store)


def _stem(url: str) -> str:
    name = sources.split_query(url)[0].rpartition("/")[2]
    stem = sources.without_ending(name)
    return stem if stem != name else name.rpartition(".")[0] or name


def _sizes_of(index: ShardIndex, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) uint16 sizes of the source pictures of these rows, and (n,) which of them the tar file lost. The index
    knows the sizes."""
    assert index.original_px is not None
    sizes = np.zeros((len(rows), 2), dtype=np.uint16)
    sizes[rows >= 0] = as_stored(index.original_px[rows[rows >= 0]])
    return sizes, (rows < 0) | np.isin(rows, list(index.flaws))


def _large_enough(sizes: np.ndarray, min_original_px: int) -> np.ndarray:
    """(n, 2) heights and widths -> (n,) bool; what is not known is large enough."""
    shorter = sizes.min(axis=1)
    return (shorter >= min_original_px) | (shorter == 0)
