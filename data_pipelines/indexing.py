"""Indexes of shards: where each sample lies, so that training starts and resumes at once."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from t2i.data.index import SUFFIX, ShardIndex
from t2i.data.shards import SUMMARY, samples_in
from t2i.data.sources import Limits
from t2i.data.store import ShardStore
from t2i.errors import DataError, UserError
from t2i.files import written_whole

from .places import places

VERSION = 1


@dataclass
class Report:
    """shards: indexed now; skipped: whose index was up to date; samples: in all shards that can be read
    flaws: samples that the tar files lost, by cause; unreadable: shard -> why"""

    shards: int = 0
    skipped: int = 0
    samples: int = 0
    flaws: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)


def index_shards(
    urls: Sequence[str], out: Path | None, processes: int, progress: Callable[[int], None]
) -> Report:
    """Writes `00000.index.npz` beside each shard and `index.json`, the sizes of all, into each folder; where `out` is
    given, as it has to be for remote shards, into that folder, from where they are to be uploaded.

    An index that fits its shard's size in bytes is kept. progress: called with the number of shards done with.
    Raises ConfigError where there is no place for an index, DataError where no shard can be read, OSError where an
    index cannot be written; those before it stay.
    """
    files = places(urls, SUFFIX, out)
    report = Report()
    sizes: dict[Path, dict[str, dict[str, int]]] = defaultdict(dict)
    # Spawned, not forked: threads of this process may hold locks.
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    try:
        for url, done in zip(files, pool.map(_index_one, files, files.values()), strict=True):
            if isinstance(done, str):
                report.unreadable[url] = done
            else:
                samples, size_bytes, flaws, skipped = done
                sizes[files[url].parent][Path(url).name] = {"samples": samples, "bytes": size_bytes}
                report.shards += not skipped
                report.skipped += skipped
                report.samples += samples
                report.flaws.update(flaws)
            progress(1)
    finally:
        pool.shutdown(cancel_futures=True)
    if not sizes:
        raise DataError(
            f"None of {len(files)} shards can be read; of the first: {next(iter(report.unreadable.values()))}"
        )
    for folder, shards in sizes.items():
        known = {"version": VERSION, "shards": _known(folder) | shards}
        with written_whole(folder / SUMMARY) as unfinished:
            unfinished.write_text(json.dumps(known, indent=1))
    return report


def _index_one(url: str, place: Path) -> tuple[int, int, dict[str, int], bool] | str:
    """Samples, bytes, flaws by cause and whether an index was there; or why the shard cannot be read. Raises OSError
    where the index cannot be written."""
    try:
        store = ShardStore(Limits(), allow_pipes=True)
        index = _read(place)
        with store.open(url) as file:
            shard = file.fileno()
            skipped = index is not None and index.original_px is not None and index.fits(shard)
            if index is None or not skipped:
                index = ShardIndex.scan(url, shard).with_sizes(shard)
        samples = samples_in(index, url, store)
    except (UserError, OSError) as error:
        return str(error)
    if not skipped:
        with written_whole(place) as unfinished:
            unfinished.write_bytes(index.to_bytes())
    return samples, index.file_bytes, dict(Counter(index.flaws.values())), skipped


def _read(place: Path) -> ShardIndex | None:
    try:
        return ShardIndex.from_bytes(place.read_bytes(), str(place))
    except (OSError, DataError):
        return None


def _known(folder: Path) -> dict[str, Any]:
    """Shards of the folder that an earlier call indexed and that are still there."""
    try:
        shards: dict[str, Any] = json.loads((folder / SUMMARY).read_bytes())["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: entry for name, entry in shards.items() if (folder / name).is_file()}
