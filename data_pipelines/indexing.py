"""Indexes of shards: where each sample lies, so that training starts and resumes at once."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np

from t2i.data import sources
from t2i.data.folder_index import SAMPLE_BYTES, SUMMARY, as_stored, read_folder_index, sizes_name
from t2i.data.index import SETTLED_S, SUFFIX, ShardIndex
from t2i.data.index import VERSION as INDEX_VERSION
from t2i.data.sources import Limits
from t2i.data.statistics import samples_in
from t2i.data.store import ShardStore
from t2i.errors import DataError, UserError, sentence
from t2i.few import plural
from t2i.files import written_whole
from t2i.launch.ranks import Rank

from .places import places
from .processes import leave_interrupts
from .selection import NothingToWrite

VERSION = 1
TOGETHER = 32  # shards that a process takes at a time


@dataclass
class Report:
    """shards: indexed now; skipped: whose index was up to date; samples: in all shards that can be read
    flaws: samples that the tar files lost, by cause; unreadable: shard -> why"""

    shards: int = 0
    skipped: int = 0
    samples: int = 0
    flaws: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, entry: dict[str, Any], skipped: bool) -> None:
        """A shard, by its entry in index.json."""
        self.shards += not skipped
        self.skipped += skipped
        self.samples += entry["samples"]
        self.flaws.update(entry.get("flaws", {}))


@dataclass(frozen=True)
class Done:
    """A shard that is indexed.

    entry: what index.json says of it, but for its `first` among the sizes
    sizes_px: (n, 2) uint16 of its samples; skipped: its index was up to date
    """

    entry: dict[str, Any]
    sizes_px: np.ndarray
    skipped: bool


def index_shards(
    urls: Sequence[str], out: Path | None, processes: int, progress: Callable[[int], None]
) -> Report:
    """Writes `00000.index.npz` beside each shard, and into each folder `index.json` and the file of sizes that it names
    (see t2i.data.folder_index); where `out` is given, as it has to be for remote shards, into that folder, from where
    they are to be uploaded.

    A shard that is as it was when it was indexed is not opened; an index that fits its shard's size in bytes is kept.
    progress: called with the number of shards done with. Raises ConfigError where there is no place for an index,
    DataError where no shard can be read, OSError where an index cannot be written; those before it stay.
    """
    files = places(urls, SUFFIX, out)
    folders: dict[Path, list[str]] = defaultdict(list)
    for url, place in files.items():
        folders[place.parent].append(url)
    known = {folder: _Known(folder) for folder in folders}
    unchanged = {url for folder in folders for url in known[folder].unchanged(folders[folder], files)}
    changed = [url for here in folders.values() for url in here if url not in unchanged]
    report = Report()
    with _indexed(changed, files, processes) as done:
        for folder, here in folders.items():
            _index_folder(folder, here, known[folder], unchanged, done, report, progress)
    if report.shards + report.skipped == 0:
        raise DataError(
            f"None of {plural(len(files), 'shard')} can be read; of the first: {next(iter(report.unreadable.values()))}"
        )
    return report


def index_share(
    urls: Sequence[str], out: Path | None, processes: int, rank: Rank, progress: Callable[[int], None]
) -> Report:
    """Of several processes each writes the indexes of its shards alone. `index_shards`, called by one process after all
    of them, keeps those and writes what it is about whole folders. Raises as it does, but for shards that cannot be
    read."""
    files = places(urls, SUFFIX, out)
    mine, report = urls[rank.rank :: rank.world], Report()
    with _indexed(mine, files, processes) as done:
        for url, found in zip(mine, done, strict=True):
            if isinstance(found, str):
                report.unreadable[url] = found
            else:
                report.add(found.entry, found.skipped)
            progress(1)
    return report


@contextmanager
def _indexed(
    urls: Sequence[str], files: Mapping[str, Path], processes: int
) -> Iterator[Iterator[Done | str]]:
    """What `_index_one` makes of each, in order; in this process where others would have nothing to do."""
    targets = [files[url] for url in urls]
    processes = min(processes, len(urls))
    if processes <= 1:
        yield map(_index_one, urls, targets)
        return
    # Spawned, not forked: threads of this process may hold locks.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), leave_interrupts)
    try:
        together = max(1, min(TOGETHER, len(urls) // (4 * processes)))
        yield pool.map(_index_one, urls, targets, chunksize=together)
    finally:
        pool.shutdown(cancel_futures=True)


def _index_folder(
    folder: Path,
    urls: Sequence[str],
    known: _Known,
    unchanged: set[str],
    done: Iterator[Done | str],
    report: Report,
    progress: Callable[[int], None],
) -> None:
    """Writes what is known of all shards of a folder. done: of those of `urls` that changed, in order"""
    names = {url: _name(url) for url in urls}
    others = known.entries.keys() - names.values()
    gone = {other for other in others if not (folder / other).is_file()}
    if unchanged.issuperset(urls) and not gone:
        for url in urls:
            report.add(known.entries[names[url]], skipped=True)
        progress(len(urls))
        return

    def shards() -> Iterator[tuple[str, dict[str, Any], np.ndarray | None]]:
        """Name, entry and sizes of each."""
        for url in urls:
            if url in unchanged:
                entry, sizes_px, skipped = known.entries[names[url]], known.sizes_px(names[url]), True
            elif isinstance(found := next(done), str):
                report.unreadable[url] = found
                progress(1)
                continue
            else:
                entry, sizes_px, skipped = found.entry, found.sizes_px, found.skipped
            report.add(entry, skipped)
            progress(1)
            yield names[url], entry, sizes_px
        for other in sorted(others - gone):
            yield other, known.entries[other], known.sizes_px(other)

    entries: dict[str, dict[str, Any]] = {}
    digits = uuid.uuid4().hex[:16]
    with suppress(NothingToWrite), written_whole(folder / sizes_name(digits)) as unfinished:
        with unfinished.open("wb") as file:
            for name, entry, sizes_px in shards():
                entries[name] = {key: value for key, value in entry.items() if key != "first"}
                if sizes_px is not None:
                    entries[name]["first"] = file.tell() // SAMPLE_BYTES
                    file.write(sizes_px.tobytes())
        if not entries:
            raise NothingToWrite
    if not entries:
        return
    with written_whole(folder / SUMMARY) as unfinished:
        written = {"version": VERSION, "sizes": digits, "shards": entries}
        unfinished.write_text(json.dumps(written, separators=(",", ":")))
    if known.index.sizes:
        Path(known.index.sizes).unlink(missing_ok=True)


class _Known:
    """What an earlier call wrote of a folder. entries: of each shard, by its name"""

    def __init__(self, folder: Path) -> None:
        self.index = read_folder_index(str(folder / SUMMARY), Limits())
        self.entries: dict[str, dict[str, Any]] = {}
        if self.index.row_of:
            values = json.loads((folder / SUMMARY).read_bytes())["shards"]
            self.entries = {name: values[name] for name in self.index.row_of}
        self._file: IO[bytes] | None = None
        with suppress(OSError):
            self._file = open(self.index.sizes, "rb", buffering=0) if self.index.sizes else None  # noqa: SIM115

    def sizes_px(self, name: str) -> np.ndarray | None:
        """(n, 2) uint16 of the samples of a shard; None where they are not known."""
        row = self.index.row_of[name]
        first, samples = int(self.index.first[row]), int(self.index.samples[row])
        if self._file is None or first < 0:
            return None
        data = os.pread(self._file.fileno(), SAMPLE_BYTES * samples, SAMPLE_BYTES * first)
        return (
            np.frombuffer(data, dtype="<u2").reshape(-1, 2) if len(data) == SAMPLE_BYTES * samples else None
        )

    def unchanged(self, urls: Sequence[str], files: dict[str, Path]) -> set[str]:
        """Those shards that are as they were when they were indexed, with an index that is still there."""
        if self._file is None:
            return set()
        length = os.fstat(self._file.fileno()).st_size // SAMPLE_BYTES
        stops = self.index.first + self.index.samples

        def same(url: str) -> bool:
            name = _name(url)
            row = self.index.row_of.get(name)
            if row is None or not 0 <= int(self.index.first[row]) <= int(stops[row]) <= length:
                return False
            stamp = self.entries[name].get("stamp")
            return stamp is not None and stamp == _stamp(url) and files[url].is_file()

        def those(some: Sequence[str]) -> list[str]:
            return [url for url in some if same(url)]

        with ThreadPoolExecutor(sources.LOOKUPS) as pool:
            pieces = [urls[start : start + 256] for start in range(0, len(urls), 256)]
            return {url for found in pool.map(those, pieces) for url in found}


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _stamp(url: str) -> list[int] | None:
    """What an index depends on: how it is made; the shard's bytes, when they changed, and when what img2dataset counted
    did, in ns; None where that cannot be said for sure."""
    if not sources.is_local(url):
        return None
    try:
        shard = os.stat(sources.local_path(url))
        counted = _changed_ns(sources.local_path(sources.beside(url, "_stats.json")))
    except OSError:
        return None
    if time.time() - max(shard.st_mtime, counted / 1e9) < SETTLED_S:
        return None
    return [INDEX_VERSION, shard.st_size, shard.st_mtime_ns, counted]


def _changed_ns(path: Path) -> int:
    """0 where the file is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


def _index_one(url: str, place: Path) -> Done | str:
    """Or why the shard cannot be read. Raises OSError where the index cannot be written."""
    try:
        store = ShardStore(Limits(), allow_pipes=True)
        index, stamp = _read(place), _stamp(url)
        with store.open_tar(url) as file:
            shard = file.fileno()
            skipped = index is not None and index.original_px is not None and index.fits(shard)
            if index is None or not skipped:
                index = ShardIndex.scan(url, shard).with_sizes(shard)
        samples = samples_in(index, url, store)
    except (UserError, OSError) as error:
        return sentence(error)
    if not skipped:
        with written_whole(place) as unfinished:
            unfinished.write_bytes(index.to_bytes())
    assert index.original_px is not None
    sizes_px = np.zeros((samples, 2), dtype=np.uint16)
    sizes_px[: len(index)] = as_stored(index.original_px)
    length = (
        sources.size(url) if sources.is_local(url) else index.file_bytes
    )  # of a compressed one, as it lies there
    entry: dict[str, Any] = {"samples": samples, "bytes": length}
    if stamp is not None:
        entry["stamp"] = stamp
    if index.flaws:
        entry["flaws"] = dict(Counter(index.flaws.values()))
        entry["flawed"] = [row for row in sorted(index.flaws) if sizes_px[row].any()]
    return Done(entry, sizes_px, skipped)


def _read(place: Path) -> ShardIndex | None:
    try:
        return ShardIndex.from_bytes(place.read_bytes(), str(place))
    except (OSError, DataError):
        return None
