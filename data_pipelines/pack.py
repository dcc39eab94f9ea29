"""Pictures of one's own to shards: a folder with a `.txt` beside each picture, or a table of (path, caption, ...)."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.data.decode import BadSample
from t2i.data.members import PICTURE_ENDINGS
from t2i.errors import ConfigError, DataError
from t2i.files import written_whole

from .optional import need
from .pictures import prepare
from .shard_writer import (
    Failure,
    Sample,
    check_samples_per_shard,
    free_names,
    stats_of,
    write_shard,
    write_table,
)
from .tables import json_record, json_records, open_table

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Row:
    """One picture to pack. caption: None where it stands in the `.txt` beside the picture."""

    path: Path
    caption: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """packed: samples written; skipped: shards that were there already; failed: pictures left out, by cause;
    tables: whether a .parquet was written beside each shard, for which pyarrow must be installed"""

    packed: int = 0
    shards: int = 0
    skipped: int = 0
    tables: bool = True
    failed: Counter[str] = field(default_factory=Counter)


def rows_of(source: Path, path_column: str = "path", caption_column: str = "caption") -> list[Row]:
    """What there is to pack, in a fixed order. Paths in a table count from the table's folder. Raises DataError
    for a source that is not there, is neither a folder nor a .csv, .jsonl or .parquet, or lacks a column."""
    if source.is_dir():
        pictures = (p for p in source.rglob("*") if p.suffix.lower().lstrip(".") in PICTURE_ENDINGS)
        rows = [Row(path, None) for path in sorted(pictures)]
        if not rows:
            raise DataError(f"{source} holds no pictures; allowed: {', '.join(PICTURE_ENDINGS)}.")
        return rows
    records = _records(source)
    rows = []
    for number, record in enumerate(records, 1):
        for column in (path_column, caption_column):
            if not isinstance(record.get(column), str):
                raise DataError(
                    f"Row {number} of {source} has no {column}; it has {', '.join(map(str, record))}."
                )
        others = {k: v for k, v in record.items() if k not in (path_column, caption_column, None)}
        named = {name: others[column] for column, name in free_names(others).items()}
        rows.append(Row(source.parent / record[path_column], record[caption_column], named))
    if not rows:
        raise DataError(f"{source} has no rows.")
    return rows


def _records(source: Path) -> list[dict[str, Any]]:
    if source.suffix == ".parquet":
        table = open_table(str(source), source.parent)
        return [record for part in table.slices(4096) for record in json_records(part)]
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}.") from error
    if source.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if source.suffix == ".jsonl":
        return [json_record(source, number, line) for number, line in enumerate(io.StringIO(text), 1)]
    raise DataError(f"{source} is not a source; allowed: a folder, or a table .csv, .jsonl or .parquet.")


def pack(rows: Sequence[Row], out: Path, samples_per_shard: int, progress: Callable[[int], None]) -> Report:
    """Writes `out`/00000.tar, ... and beside each its `_stats.json`, which names what was left out and why, and
    where pyarrow is installed its `.parquet` with a row for each of `rows`.

    Shard i holds rows i * samples_per_shard and on, so that a second call goes on at the first shard that is not
    there. progress is called with the number of rows done with. Raises DataError where a shard that is there was
    packed from other rows.
    """
    check_samples_per_shard(samples_per_shard)
    out.mkdir(parents=True, exist_ok=True)
    columns = _columns(rows)
    report = Report(tables=columns is not None)
    for shard, start in enumerate(range(0, len(rows), samples_per_shard)):
        part = rows[start : start + samples_per_shard]
        path, stats_path = out / f"{shard:05d}.tar", out / f"{shard:05d}_stats.json"
        digest = _digest(part)
        if path.exists():
            stats = stats_of(path, digest, "was not packed from these rows")
            report.skipped += 1
            progress(len(part))
        else:
            failed: list[dict[str, str]] = []
            outcomes: list[Sample | Failure] = []
            with written_whole(path) as complete:  # last, so that a shard that is there has its statistics
                write_shard(_samples(part, failed, outcomes, progress), complete, shard)
                if columns is not None:
                    write_table(
                        outcomes, columns.slice(start, len(part)), path.with_suffix(".parquet"), shard
                    )
                stats = {
                    "count": len(part),
                    "successes": len(part) - len(failed),
                    "failed": failed,
                    "rows": digest,
                }
                stats_path.write_text(json.dumps(stats, ensure_ascii=False, indent=1))
        report.shards += 1
        report.packed += stats["successes"]
        report.failed.update(each["cause"] for each in stats["failed"])
    return report


def _digest(rows: Sequence[Row]) -> str:
    known = json.dumps([(str(row.path), row.caption, dict(row.columns)) for row in rows])
    return hashlib.sha256(known.encode()).hexdigest()


def _samples(
    rows: Sequence[Row],
    failed: list[dict[str, str]],
    outcomes: list[Sample | Failure],
    progress: Callable[[int], None],
) -> Iterator[tuple[int, Sample]]:
    """The rows that are good, each with its place in the shard; the others go to `failed`. All go to `outcomes`,
    without their pictures."""
    for index, row in enumerate(rows):
        try:
            sample = _sample(row)
            outcomes.append(replace(sample, image=b""))
            yield index, sample
        except BadSample as error:
            failed.append({"path": str(row.path), "cause": error.cause, "error": str(error)})
            outcomes.append(Failure("failed", str(error).removeprefix(f"sample {row.path}: "), row.caption))
        progress(1)


def _sample(row: Row) -> Sample:
    """Raises BadSample: "caption" or "image" for what cannot be read, "bomb" for too many pixels."""
    name = str(row.path)
    try:
        caption = row.caption if row.caption is not None else row.path.with_suffix(".txt").read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSample("caption", name, str(error)) from error
    if not caption.strip():
        raise BadSample("caption", name, "it is empty")
    try:
        data = row.path.read_bytes()
    except OSError as error:
        raise BadSample("image", name, str(error)) from error
    picture = prepare(data, name)
    image = picture.image or data
    return Sample(
        image,
        picture.extension,
        caption.strip(),
        picture.width,
        picture.height,
        picture.original_width,
        picture.original_height,
        columns=_further(row),
        exif=picture.exif,
        sha256=hashlib.sha256(image).hexdigest(),
    )


def _further(row: Row) -> dict[str, Any]:
    """What a sample's JSON has beside the layout's own fields."""
    return {"source": row.path.name, **row.columns}


def _columns(rows: Sequence[Row]) -> pa.Table | None:
    """`_further` of all rows as columns, so that the tables of all shards have the same types; values of several
    types as text. None where pyarrow is not installed."""
    try:
        pa = need("pyarrow", "data")
    except ConfigError:
        return None
    records = [_further(row) for row in rows]
    columns = {}
    for name in dict.fromkeys(itertools.chain.from_iterable(records)):
        values = [record.get(name) for record in records]
        try:
            column = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            texts = [
                value if value is None or isinstance(value, str) else json.dumps(value) for value in values
            ]
            column = pa.array(texts, pa.string())
        columns[name] = column.cast(pa.string()) if pa.types.is_null(column.type) else column
    return pa.table(columns)
