"""The samples of a selection as shards of their own.

Keys are numbered anew by the rule of the layout, so that they are unique whatever the shards were called that the
samples come from; the table beside each shard says which those were (`source_shard`, `source_key`). Members are copied
byte for byte: the key inside a sample's JSON stays the one it had.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.data.selection import listed

from ..optional import arrow_file, need
from ..selection import spans
from ..shard_metadata import first_rows, local_copy, metadata_of, scan
from ..shard_writer import check_no_more, check_samples_per_shard, sample_key, stats_of, whole_shard


@dataclass
class Report:
    """packed: samples written; skipped: shards that were there already; failed: samples left out, by cause"""

    packed: int = 0
    shards: int = 0
    skipped: int = 0
    failed: Counter[str] = field(default_factory=Counter)


def repack(
    selection: Path,
    out: Path,
    samples_per_shard: int,
    progress: Callable[[int], None],
    pipes: Collection[str] = (),
) -> Report:
    """Writes `out`/00000.tar, ... with the table and `_stats.json` of each, which names what was left out and why.

    A second call goes on at the first shard that is not there. progress is called with the number of samples done
    with. pipes: commands that the selection may name (see `selection.listed`). Raises DataError where a shard that is
    there holds another selection's samples, or a source cannot be read.
    """
    check_samples_per_shard(samples_per_shard)
    selected = listed([str(selection)], pipes)
    samples = sum(len(each.keys) for each in selected)
    check_no_more(out, -(-samples // samples_per_shard), "these samples")
    report = Report()
    with _Sources() as sources:
        for shard, run in enumerate(spans(selected, samples_per_shard)):
            wanted = [(each.url, each.keys[start:stop].to_pylist()) for each, start, stop in run]
            digest = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
            path = out / f"{shard:05d}.tar"
            if path.exists():
                stats = stats_of(path, digest, "holds another selection's samples")
                report.skipped += 1
            else:
                with whole_shard(path) as (tar_path, stats_path, table_path):
                    stats = _write(sources, wanted, tar_path, table_path, shard) | {"rows": digest}
                    stats_path.write_text(json.dumps(stats, ensure_ascii=False, indent=1))
            report.shards += 1
            report.packed += stats["successes"]
            report.failed.update(each["cause"] for each in stats["failed"])
            progress(sum(len(keys) for _, keys in wanted))
    return report


class _Sources:
    """The shards that samples come from, one open at a time, as a selection goes through them in order."""

    def __enter__(self) -> _Sources:
        self._open: contextlib.ExitStack = contextlib.ExitStack()
        self._url = ""
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def turn_to(self, url: str) -> None:
        """Raises DataError."""
        if url == self._url:
            return
        self._open.close()
        path = self._open.enter_context(local_copy(url))
        self._index = scan(path, url)
        self._file = self._open.enter_context(path.open("rb"))
        self._rows = first_rows(self._index)
        self.metadata, _ = metadata_of(url)
        self._url = url

    def members(self, key: str) -> dict[str, bytes] | str:
        """By extension, or why there are none."""
        row = self._rows.get(key)
        if row is None:
            return "missing"
        if row in self._index.flaws:
            return self._index.flaws[row]
        try:
            return self._index.read(self._file.fileno(), row)
        except OSError:
            return "unreadable"


def _write(
    sources: _Sources, wanted: Sequence[tuple[str, list[str]]], tar_path: Path, table_path: Path, shard: int
) -> dict[str, Any]:
    """Writes the tar of shard number `shard` and its table; returns its statistics."""
    pa, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    failed: list[dict[str, str]] = []
    tables: list[Any] = []
    place = count = 0
    with tarfile.open(tar_path, "w", format=tarfile.PAX_FORMAT) as tar:
        for url, keys in wanted:
            sources.turn_to(url)
            new: dict[str, str] = {}  # key there -> key here
            for key in keys:
                members = sources.members(key)
                if isinstance(members, str):
                    failed.append({"shard": url, "key": key, "cause": members})
                else:
                    new[key] = sample_key(shard, place)
                    for extension, content in members.items():
                        info = tarfile.TarInfo(f"{new[key]}.{extension}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                place += 1
            count += len(new)
            tables.append(_rows_of(sources.metadata, url, new))
    with arrow_file(table_path, "wb") as file:
        parquet.write_table(pa.concat_tables(tables, promote_options="permissive"), file)
    return {"count": place, "successes": count, "failed": failed}


def _rows_of(metadata: Any, url: str, new: dict[str, str]) -> Any:
    """The metadata of the keys of `new`, in its order and under the new keys; empty where there are none."""
    pa, compute = need("pyarrow", "data"), need("pyarrow.compute", "data")
    keys = pa.array(list(new), pa.string())
    rows = metadata.take(compute.index_in(keys, value_set=metadata["key"].combine_chunks()))
    rows = rows.set_column(
        rows.column_names.index("key"), "key", pa.array(list(new.values()), pa.string())
    ).replace_schema_metadata(None)
    rows = rows.drop_columns([name for name in ("source_shard", "source_key") if name in rows.column_names])
    return rows.append_column("source_shard", pa.array([url] * len(new), pa.string())).append_column(
        "source_key", keys
    )
