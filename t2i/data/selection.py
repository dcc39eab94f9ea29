"""Selections: which samples of which shards, as `t2i data filter` and `dedup` write them.

An Arrow IPC file, mapped into memory and not read: a hundred million keys cost neither time at the start nor memory in
each process.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2i.data import sources
from t2i.data.index import ShardIndex
from t2i.errors import DataError

SUFFIX = ".arrow"


@dataclass(frozen=True)
class Listed:
    """A shard, and the keys of those of its samples that are wanted (a pyarrow string array); None: all of them."""

    url: str
    keys: Any = None

    def key(self, place: int) -> str | None:
        return self.keys[place].as_py() if self.keys is not None and place < len(self.keys) else None

    def rows(self, index: ShardIndex) -> np.ndarray:
        """int64 rows of `index`, -1 for a key that is not in it. Raises DataError where the keys are not text."""
        if self.keys is None:
            return np.arange(len(index))
        try:
            self.keys.validate(full=True)  # here rather than at the start, where it would read the whole file
        except ValueError as error:
            raise DataError(f"The selection of {self.url} is damaged: {error}.") from error
        place = {key: row for row, key in reversed(list(enumerate(index.keys)))}  # the first of a key counts
        return np.array([place.get(key, -1) for key in self.keys.to_pylist()], dtype=np.int64)


def listed(urls: Sequence[str], pipes: Collection[str] = ()) -> list[Listed]:
    """Shards as they are, selections as the shards that they name. Raises DataError.

    pipes: commands that a selection may name beside those in `urls`; all others would be run out of a file
    """
    typed = {*pipes, *(url for url in urls if url.startswith("pipe:"))}
    found: list[Listed] = []
    for url in urls:
        found += _read(url, typed) if url.endswith(SUFFIX) and url not in typed else [Listed(url)]
    return found


def _read(url: str, pipes: Collection[str]) -> list[Listed]:
    """The shards of a selection: columns `shard` (a dictionary; local paths count from the file's folder) and `key`,
    rows grouped by shard."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{url} needs the package pyarrow; install it with `pip install 't2i[data]'`."
        ) from error
    if not sources.is_local(url):
        raise DataError(f"{url} is a selection, which has to be local; copy it here first.")
    path = sources.local_path(url)
    if not os.path.exists(path):
        raise DataError(f"{url} does not exist.")
    try:
        table = pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()
        table.validate()
        shards, keys = table.column("shard").combine_chunks(), table.column("key")
        shards.dictionary.validate(full=True)
        codes, names = np.asarray(shards.indices), shards.dictionary.to_pylist()
        if keys.type != pa.string():
            raise ValueError(f"its keys are {keys.type}, not string")
        if codes.dtype.kind != "i" or ((codes < 0) | (codes >= len(names))).any() or None in names:
            raise ValueError("its shards are not those of its dictionary")
    except (
        OSError,
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
        MemoryError,
        pa.ArrowException,
    ) as error:
        raise DataError(f"{url} is not a selection as `t2i data filter` writes it: {error}.") from error
    for name in names:
        if name.startswith("pipe:") and name not in pipes:
            raise DataError(
                f"{url} names the shard {name}, and a command is run only where the command line itself names it; "
                "allowed in a selection: paths and URLs."
            )
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    stops = [*starts[1:].tolist(), len(codes)]
    return [
        Listed(_beside(names[codes[start]], path), keys.slice(start, stop - start))
        for start, stop in zip(starts.tolist(), stops, strict=True)
    ]


def _beside(name: str, path: Path) -> str:
    return str(path.parent / name) if sources.is_local(name) else name
