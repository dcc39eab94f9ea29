"""Pictures of one's own to shards: a folder with a `.txt` beside each picture, or a table of (path, caption, ...)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from t2i.data.decode import IMAGE_EXTENSIONS, BadSample, decode_image
from t2i.errors import DataError

from .shard_writer import Sample, check_samples_per_shard, png_sample, write_shard

KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # these formats go into the shard byte for byte


@dataclass(frozen=True)
class Row:
    """One picture to pack. caption: None where it stands in the `.txt` beside the picture."""

    path: Path
    caption: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """packed: samples written; skipped: shards that were there already; failed: pictures left out, by cause"""

    packed: int = 0
    shards: int = 0
    skipped: int = 0
    failed: Counter[str] = field(default_factory=Counter)


def rows_of(source: Path, path_column: str = "path", caption_column: str = "caption") -> list[Row]:
    """What there is to pack, in a fixed order. Paths in a table count from the table's folder. Raises DataError
    for a source that is not there, is neither a folder nor a .csv or .jsonl, or lacks a column."""
    if source.is_dir():
        pictures = (p for p in source.rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
        rows = [Row(path, None) for path in sorted(pictures)]
        if not rows:
            raise DataError(f"{source} holds no pictures; allowed: {', '.join(IMAGE_EXTENSIONS)}.")
        return rows
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{source} cannot be read: {error}.") from error
    if source.suffix == ".csv":
        records: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    elif source.suffix == ".jsonl":
        records = list(_json_lines(source, text))
    else:
        raise DataError(f"{source} is not a source; allowed: a folder, or a table .csv or .jsonl.")
    rows = []
    for number, record in enumerate(records, 1):
        for column in (path_column, caption_column):
            if not isinstance(record.get(column), str):
                raise DataError(
                    f"Row {number} of {source} has no {column}; it has {', '.join(map(str, record))}."
                )
        others = {k: v for k, v in record.items() if k not in (path_column, caption_column, None)}
        rows.append(Row(source.parent / record[path_column], record[caption_column], others))
    if not rows:
        raise DataError(f"{source} has no rows.")
    return rows


def _json_lines(source: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"Line {number} of {source} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise DataError(f"Line {number} of {source} is a {type(record).__name__}; allowed: an object.")
        yield record


def pack(rows: Sequence[Row], out: Path, samples_per_shard: int, progress: Callable[[int], None]) -> Report:
    """Writes `out`/00000.tar, ... and beside each its `_stats.json`, which names what was left out and why.

    Shard i holds rows i * samples_per_shard and on, so that a second call goes on at the first shard that is not
    there. progress is called with the number of rows done with. Raises DataError where a shard that is there was
    packed from other rows.
    """
    check_samples_per_shard(samples_per_shard)
    out.mkdir(parents=True, exist_ok=True)
    report = Report()
    for shard, start in enumerate(range(0, len(rows), samples_per_shard)):
        part = rows[start : start + samples_per_shard]
        path, stats_path = out / f"{shard:05d}.tar", out / f"{shard:05d}_stats.json"
        digest = _digest(part)
        if path.exists():
            stats = _stats_of(stats_path, path, digest)
            report.skipped += 1
            progress(len(part))
        else:
            failed: list[dict[str, str]] = []
            complete = out / f".{shard:05d}.tar"
            write_shard(_samples(part, failed, progress), complete, shard)
            stats = {
                "count": len(part),
                "successes": len(part) - len(failed),
                "failed": failed,
                "rows": digest,
            }
            stats_path.write_text(json.dumps(stats, ensure_ascii=False, indent=1))
            complete.replace(path)  # last, so that a shard that is there has its statistics
        report.shards += 1
        report.packed += stats["successes"]
        report.failed.update(each["cause"] for each in stats["failed"])
    return report


def _stats_of(stats_path: Path, shard: Path, digest: str) -> dict[str, Any]:
    try:
        stats = json.loads(stats_path.read_text())
        same = stats["rows"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(f"{shard} was not packed from these rows; remove it, or name another folder.")
    return stats


def _digest(rows: Sequence[Row]) -> str:
    known = json.dumps([(str(row.path), row.caption, dict(row.columns)) for row in rows])
    return hashlib.sha256(known.encode()).hexdigest()


def _samples(
    rows: Sequence[Row], failed: list[dict[str, str]], progress: Callable[[int], None]
) -> Iterator[tuple[int, Sample]]:
    """The rows that are good, each with its place in the shard; the others go to `failed`."""
    for index, row in enumerate(rows):
        try:
            yield index, _sample(row)
        except BadSample as error:
            failed.append({"path": str(row.path), "cause": error.cause, "error": str(error)})
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
    picture, (height, width) = decode_image(data, name)
    with Image.open(io.BytesIO(data)) as opened:
        extension = KEPT.get(opened.format or "")
    columns = {"source": row.path.name, **row.columns}
    if extension is None:
        return png_sample(picture, caption.strip(), columns)
    return Sample(data, extension, caption.strip(), width, height, width, height, columns=columns)  # type: ignore[arg-type]
