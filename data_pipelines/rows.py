"""What there is to pack: the pictures of a folder, or the rows of a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.data.members import PICTURE_ENDINGS, READ, UNREAD_ENDINGS
from t2i.errors import ConfigError, DataError

from .optional import need
from .places import printable
from .shard_writer import free_names
from .table_files import SUFFIXES
from .tables import json_records, open_table, text_column

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Row:
    """One picture to pack. path: None where a table names none; caption: None where it stands in the `.txt` beside the
    picture; columns: what else a table says of it"""

    path: Path | None
    caption: str | None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Some rows. columns: the name of each file ("source") and what a table says of it, of the same types in all parts;
    None where pyarrow is not installed"""

    rows: list[Row]
    columns: pa.Table | None


@dataclass(frozen=True)
class Rows:
    """All rows of a source, in a fixed order.

    count: how many
    parts: so many rows at a time -> all parts
    passed_by: what of the source is no row, by cause; of a table complete after its last part
    """

    count: int
    parts: Callable[[int], Iterator[Part]]
    passed_by: Callable[[], Counter[str]]


def rows_of(source: Path, path_column: str = "path", caption_column: str = "caption") -> Rows:
    """What there is to pack. Paths in a table count from the table's folder, its columns are found in any case. Raises
    DataError for a source that is not there, is neither a folder nor a table, or lacks a column."""
    if source.is_dir():
        return _of_folder(source)
    if source.suffix.lower() not in SUFFIXES:
        raise DataError(f"{source} is not a source; allowed: a folder, or a table ({', '.join(SUFFIXES)}).")
    table = open_table(str(source), source.parent, {caption_column.lower()}, {path_column.lower()})
    path, caption = text_column(table, path_column), text_column(table, caption_column)

    def parts(count: int) -> Iterator[Part]:
        for each in table.slices(count):
            yield _table_part(each, source.parent, path, caption)

    return Rows(table.rows, parts, lambda: table.unusable)


def _table_part(part: pa.Table, folder: Path, path_column: str, caption_column: str) -> Part:
    pa = need("pyarrow", "data")
    others = part.drop_columns([path_column, caption_column])
    others = others.rename_columns(list(free_names(others.column_names).values()))
    for at, each in enumerate(others.schema):
        if pa.types.is_null(each.type):
            others = others.set_column(at, each.name, others[each.name].cast(pa.string()))
    columns = json_records(others) if others.num_columns else [{}] * part.num_rows
    paths = [None if name is None else folder / os.fsdecode(name) for name in part[path_column].to_pylist()]
    captions = [caption or "" for caption in part[caption_column].to_pylist()]
    rows = [Row(*each) for each in zip(paths, captions, columns, strict=True)]
    sources = pa.array([source_of(row) for row in rows], pa.string())
    return Part(rows, others.add_column(0, "source", sources))


def _of_folder(folder: Path) -> Rows:
    passed_by: Counter[str] = Counter()
    paths = sorted(_pictures(folder, passed_by))
    if not paths:
        there = ", ".join(f"{cause}: {count:,}" for cause, count in sorted(passed_by.items()))
        raise DataError(f"{folder} holds no pictures{f' ({there})' if there else ''}; allowed: {READ}.")

    def parts(count: int) -> Iterator[Part]:
        for start in range(0, len(paths), count):
            rows = [Row(path, None) for path in paths[start : start + count]]
            try:
                pa = need("pyarrow", "data")
            except ConfigError:
                yield Part(rows, None)
                continue
            yield Part(rows, pa.table({"source": pa.array(map(source_of, rows), pa.string())}))

    return Rows(len(paths), parts, lambda: passed_by)


def source_of(row: Row) -> str | None:
    return None if row.path is None else printable(row.path.name)


def _pictures(folder: Path, passed_by: Counter[str]) -> Iterator[Path]:
    """Of all folders within, linked ones too, each once whatever leads there: by its own name rather than by a link."""

    def unreadable(error: OSError) -> None:
        passed_by["folders that cannot be read"] += 1

    waiting, seen = [folder], set[tuple[int, int]]()
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for parent, folders, files in os.walk(start, onerror=unreadable):
                found = os.stat(parent)
                if (found.st_dev, found.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((found.st_dev, found.st_ino))
                links += [Path(parent, name) for name in folders if os.path.islink(Path(parent, name))]
                yield from _pictures_among(Path(parent), files, passed_by)
        waiting = sorted(links)


def _pictures_among(parent: Path, files: Sequence[str], passed_by: Counter[str]) -> Iterator[Path]:
    endings = {name: Path(name).suffix.lower().lstrip(".") for name in files}
    pictures = {name for name, ending in endings.items() if ending in PICTURE_ENDINGS}
    stems = {Path(name).stem for name in pictures}
    for name, ending in endings.items():
        if name in pictures:
            yield parent / name
        elif ending in UNREAD_ENDINGS:
            passed_by[f"pictures of a kind that is not read (.{ending})"] += 1
        elif ending == "txt" and Path(name).stem not in stems:
            passed_by["captions without a picture"] += 1
        elif ending != "txt":
            passed_by["files that are no pictures"] += 1
