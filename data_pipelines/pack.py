"""Pictures of one's own to shards: a folder with a `.txt` beside each picture, or a table of (path, caption, ...)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from t2i.data.decode import BadSample

from .pictures import Extension, prepare
from .places import printable
from .rows import Row, Rows, source_of
from .shard_writer import (
    Failure,
    Sample,
    check_no_more,
    check_samples_per_shard,
    stats_of,
    whole_shard,
    write_shard,
    write_table,
)


@dataclass
class Report:
    """packed: samples written; skipped: shards that were there already; failed: pictures left out, by cause;
    formats: samples by extension; tables: whether a .parquet was written beside each shard, for which pyarrow must be
    installed"""

    packed: int = 0
    shards: int = 0
    skipped: int = 0
    tables: bool = True
    failed: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)


def pack(
    rows: Rows,
    out: Path,
    samples_per_shard: int,
    progress: Callable[[int], None],
    extension: Extension | None = None,
) -> Report:
    """Writes `out`/00000.tar, ... and beside each its `_stats.json`, which names what was left out and why, and
    where pyarrow is installed its `.parquet` with a row for each of `rows`.

    Shard i holds rows i * samples_per_shard and on, so that a second call goes on at the first shard that is not
    there. extension: of all pictures (see `pictures.prepare`). progress is called with the number of rows done with.
    Raises DataError where a shard that is there was packed from other rows or for another extension.
    """
    check_samples_per_shard(samples_per_shard)
    check_no_more(out, -(-rows.count // samples_per_shard), "these rows")
    report = Report()
    for shard, part in enumerate(rows.parts(samples_per_shard)):
        path = out / f"{shard:05d}.tar"
        digest = _digest(part.rows, extension)
        report.tables = part.columns is not None
        if path.exists():
            stats = stats_of(path, digest, "was not packed from these rows with these options")
            report.skipped += 1
            progress(len(part.rows))
        else:
            failed: list[dict[str, str]] = []
            outcomes: list[Sample | Failure] = []
            with whole_shard(path, report.tables) as (tar, stats_path, table):
                write_shard(_samples(part.rows, extension, failed, outcomes, progress), tar, shard)
                if part.columns is not None:
                    write_table(outcomes, part.columns, table, shard)
                made = [outcome for outcome in outcomes if isinstance(outcome, Sample)]
                stats = {
                    "count": len(part.rows),
                    "successes": len(made),
                    "formats": dict(sorted(Counter(sample.extension for sample in made).items())),
                    "failed": failed,
                    "rows": digest,
                }
                stats_path.write_text(json.dumps(stats, ensure_ascii=False, indent=1), "utf-8")
        report.shards += 1
        report.packed += stats["successes"]
        report.formats.update(stats.get("formats", {}))
        report.failed.update(each["cause"] for each in stats["failed"])
    return report


def _digest(rows: Sequence[Row], extension: Extension | None) -> str:
    known: list[Any] = [(str(row.path), row.caption, dict(row.columns)) for row in rows]
    known += [] if extension is None else [extension]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _samples(
    rows: Sequence[Row],
    extension: Extension | None,
    failed: list[dict[str, str]],
    outcomes: list[Sample | Failure],
    progress: Callable[[int], None],
) -> Iterator[tuple[int, Sample]]:
    """The rows that are good, each with its place in the shard; the others go to `failed`. All go to `outcomes`,
    without their pictures."""
    for index, row in enumerate(rows):
        try:
            sample = _sample(row, extension)
            outcomes.append(replace(sample, image=b""))
            yield index, sample
        except BadSample as error:
            name, said = (printable(str(text)) for text in (row.path or "", error))
            failed.append({"path": name, "cause": error.cause, "error": said})
            outcomes.append(Failure("failed", said.removeprefix(f"sample {name}: "), row.caption))
        progress(1)


def _caption_beside(path: Path) -> str:
    """Raises OSError, UnicodeDecodeError."""
    place = path.with_suffix(".txt")
    if not place.exists():  # beside IMG.JPG from a system where case does not count
        place = path.with_suffix(".TXT")
    if not place.is_file():  # a named pipe would wait, and /dev/zero never ends
        raise FileNotFoundError(f"{path.stem}.txt is not there, or no file")
    return place.read_text("utf-8-sig")


def _sample(row: Row, extension: Extension | None) -> Sample:
    """Raises BadSample: "path" where there is none, "caption" or "image" for what cannot be read, "bomb" for too many
    pixels, "format" for a kind of picture that is not read."""
    if row.path is None:
        raise BadSample("path", "", "there is none")
    name = str(row.path)
    try:
        caption = _caption_beside(row.path) if row.caption is None else row.caption
    except (OSError, UnicodeDecodeError) as error:
        raise BadSample("caption", name, str(error)) from error
    if not (caption := caption.strip()):
        raise BadSample("caption", name, "it is empty")
    try:
        if not row.path.is_file():  # reading a named pipe would wait
            raise FileNotFoundError("no such file")
        data = row.path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadSample("image", name, str(error)) from error
    picture = prepare(data, name, extension=extension)
    image = picture.image or data
    return Sample(
        image,
        picture.extension,
        caption,
        picture.width,
        picture.height,
        picture.original_width,
        picture.original_height,
        columns={"source": source_of(row), **row.columns},
        exif=picture.exif,
        sha256=hashlib.sha256(image).hexdigest(),
    )
