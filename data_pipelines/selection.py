"""Writing selections: which samples of which shards are kept, in the file that `t2i.data.selection` maps and
`data.shards=kept.arrow` trains on.

An uncompressed Arrow IPC file with the columns `shard` (dictionary<int32, string>, one dictionary for the whole file)
and `key` (string); rows are grouped by shard. A local shard is named by its path relative to the folder of the file,
so that both can be moved together; a remote one by its URL.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from t2i.data.selection import Listed, listed
from t2i.data.sources import is_local, local_path
from t2i.errors import DataError
from t2i.files import written_whole

from .optional import arrow_file, need
from .places import first_same, printable

ROWS_PER_BATCH = 65_536


class NothingToWrite(Exception):
    """Leaves `written_whole` without a file, where nothing was kept."""


def write_selection(path: Path, shards: Sequence[str], keys: Iterable[Any]) -> int:
    """Writes the selection, batch by batch, and returns how many samples it holds. It gets its name when it is
    complete; one without samples is not written.

    shards: paths and URLs, as they are read from here
    keys: of each shard the kept ones, as an Arrow array of strings, in the order of the shard
    """
    pa = need("pyarrow", "data")
    names = pa.array([_name(shard, path.parent) for shard in shards], pa.string())
    schema = pa.schema([("shard", pa.dictionary(pa.int32(), pa.string())), ("key", pa.string())])
    count = 0
    with suppress(NothingToWrite), written_whole(path) as unfinished:
        with arrow_file(unfinished, "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for codes, column in _batches(keys):
                shard = pa.DictionaryArray.from_arrays(pa.array(codes), names)
                writer.write_batch(pa.record_batch([shard, column], schema=schema))
                count += len(column)
        if not count:
            raise NothingToWrite
    return count


def _batches(keys: Iterable[Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """(number of the shard int32, key) for about ROWS_PER_BATCH rows at a time."""
    pa = need("pyarrow", "data")
    numbers: list[np.ndarray] = []
    parts: list[Any] = []
    for number, part in enumerate(keys):
        numbers.append(np.full(len(part), number, np.int32))
        parts.append(part.cast(pa.string()))
        if sum(map(len, parts)) >= ROWS_PER_BATCH:
            yield np.concatenate(numbers), pa.concat_arrays(parts)
            numbers, parts = [], []
    if parts:
        yield np.concatenate(numbers), pa.concat_arrays(parts)


def _name(shard: str, folder: Path) -> str:
    if not is_local(shard):
        return shard
    path = local_path(shard)
    # Resolved but for the last part: the name of a shard says more than that of the blob it may point to.
    return Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()


def listed_once(shards: Sequence[str]) -> list[Listed]:
    """`t2i.data.selection.listed`, where each shard may come once. Raises DataError."""
    found = listed(shards)
    if same := first_same((_place(each.url) for each in found), fold=False):
        raise DataError(f"{found[same[1]].url} is named twice; allowed: once.")
    for each in found:
        if printable(each.url) != each.url:
            raise DataError(f"{each.url} is not named in UTF-8; allowed: names in UTF-8, as selections are.")
    return found


def _place(url: str) -> str:
    """The same however a local shard's path is spelt, and through whichever link to its folder."""
    path = local_path(url)
    return str(path.parent.resolve() / path.name) if is_local(url) else url


def spans(selected: Sequence[Listed], samples: int) -> Iterator[list[tuple[Listed, int, int]]]:
    """The samples of a selection cut into runs of `samples`: for each run the shards that it touches, and from which
    to which of their keys."""
    run: list[tuple[Listed, int, int]] = []
    room = samples
    for each in selected:
        start = 0
        while start < len(each.keys):
            stop = min(start + room, len(each.keys))
            run.append((each, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield run
                run, room = [], samples
    if run:
        yield run
