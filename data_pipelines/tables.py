"""Tables of URLs, paths and captions (.parquet, .csv, .tsv, .jsonl), one file or many, in bounded memory."""

from __future__ import annotations

import glob
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.data.sources import copy, expand, is_local, local_path
from t2i.errors import DataError
from t2i.files import written_whole

from .optional import need
from .table_files import SUFFIXES, TableFile, line

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Table:
    """One table in one or several files.

    files: local, in order
    schema: what each slice has: all columns of all files, null where a file lacks one
    rows: in all files, those that cannot be read excepted
    left_out: columns that are never read, as they hold bytes, such as whole pictures
    """

    files: tuple[TableFile, ...]
    schema: pa.Schema
    rows: int
    left_out: tuple[str, ...] = ()

    @property
    def unusable(self) -> Counter[str]:
        """Rows that cannot be read, by cause, and values that the slices until now have null in the place of."""
        return sum((file.unusable for file in self.files), Counter())

    def slices(self, rows: int) -> Iterator[pa.Table]:
        """The table in its order, `rows` rows at a time; the last slice may have fewer. Raises DataError."""
        pa = need("pyarrow", "data")
        pending: list[Any] = []
        count = 0
        for batch in itertools.chain.from_iterable(file.batches(self.schema) for file in self.files):
            while count + batch.num_rows >= rows:
                yield pa.Table.from_batches([*pending, batch.slice(0, rows - count)], self.schema)
                batch = batch.slice(rows - count)
                pending, count = [], 0
            if batch.num_rows:
                pending.append(batch)
                count += batch.num_rows
        if pending:
            yield pa.Table.from_batches(pending, self.schema)

    def find_column(self, *names: str) -> str:
        """The first of `names` that is a column, as written or else in any case (LAION's are URL and TEXT).
        Raises DataError where there is none, or where several differ by case alone."""
        for name in names:
            if name in self.schema.names:
                return name
            found = [column for column in self.schema.names if column.lower() == name.lower()]
            if len(found) > 1:
                raise DataError(
                    f"{self.files[0].path} has the columns {', '.join(found)}; name the one that is meant."
                )
            if found:
                return found[0]
        raise DataError(
            f"{self.files[0].path} has no column {names[0]}; it has {', '.join(self.schema.names)}."
        )


def open_table(
    source: str, copies: Path, text_columns: Collection[str] = (), path_columns: Collection[str] = ()
) -> Table:
    """Looks at every file of `source`: a path or URL, several by braces (`{000..127}.parquet`) or `*`.

    copies: folder for what is not on this machine. What lies there is not copied again; it is the caller's to remove.
    text_columns: lower-case names of columns that are text, even as bytes in a .parquet and whatever they look like in
        a .csv or .tsv. The types of the others are found by reading all of it once: integers, else floating-point
        numbers, else text.
    path_columns: the same of columns that name files, which become bytes: names of files need not be UTF-8
    Raises DataError where a file is missing or not what its name says, or files disagree on a column's type.
    """
    pa = need("pyarrow", "data")
    paths = itertools.chain.from_iterable(
        _files(url, copies) for url in expand(source, "table", may_be_folders=True)
    )
    files = tuple(TableFile(path, frozenset(text_columns), frozenset(path_columns)) for path in paths)
    schemas, rows = [], 0
    for file in files:
        schema, count = file.look()
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{file.path} has two columns of one name: {', '.join(schema.names)}.")
        schemas.append(schema)
        rows += count
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"The files of {source} disagree on a column: {line(error)}.") from error
    left_out = tuple(
        each.name for each in schema if _holds_bytes(each.type) and each.name.lower() not in path_columns
    )
    kept = pa.schema([each for each in schema if each.name not in left_out])
    table = Table(files, kept, rows, left_out)
    if rows == 0:
        causes = ", ".join(f"{cause}: {count:,}" for cause, count in sorted(table.unusable.items()))
        raise DataError(f"{source} has no rows" + (f" that can be read ({causes})." if causes else "."))
    return table


def _holds_bytes(kind: pa.DataType) -> bool:
    """Also within lists and structures."""
    if kind.num_fields:
        return any(_holds_bytes(kind.field(at).type) for at in range(kind.num_fields))
    return "binary" in str(kind)


def _files(url: str, copies: Path) -> list[Path]:
    """The local files that `url` stands for."""
    if not is_local(url):
        name = hashlib.sha256(url.encode()).hexdigest()[:16] + _suffix(Path(url.partition("?")[0]))
        if not (copied := copies / name).exists():
            with written_whole(copied) as unfinished:
                copy(url, unfinished)
        return [copied]
    path = local_path(url)
    found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    if not found:
        raise DataError(f"{path} does not exist.")
    for each in found:
        _suffix(each)
    return found


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} is not a table; allowed: {', '.join(SUFFIXES)}.")
    return path.suffix


def text_column(table: Table, *names: str) -> str:
    """`table.find_column`, where it holds text, or names of files as bytes. Raises DataError."""
    pa = need("pyarrow", "data")
    name = table.find_column(*names)
    kind = table.schema.field(name).type
    if kind not in (pa.string(), pa.binary(), pa.null()):
        raise DataError(f"Column {name} of {table.files[0].path} is {kind}; allowed: text.")
    return name


def json_records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows in what JSON can hold: numbers that are not finite as None, dates and the like as text."""
    columns = [map(_json_value, _values(column)) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


NANOSECONDS = "[ns"  # in the name of a type


def _values(column: pa.ChunkedArray) -> list[Any]:
    if NANOSECONDS not in str(column.type):  # else what comes depends on whether pandas is installed
        try:
            return column.to_pylist()
        except (ValueError, KeyError, OverflowError):  # moments and zones of time that Python does not know
            pass
    return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    pa = need("pyarrow", "data")
    is_nested = isinstance(scalar, pa.StructScalar | pa.ListScalar)
    is_moment = isinstance(scalar, pa.TimestampScalar | pa.DurationScalar) and scalar.is_valid
    try:
        if NANOSECONDS in str(scalar.type) and is_moment:
            zone = [scalar.type.tz] if isinstance(scalar, pa.TimestampScalar) else []
            kind = pa.timestamp if zone else pa.duration
            return scalar.cast(kind("us", *zone)).as_py()
        if not (NANOSECONDS in str(scalar.type) and is_nested and scalar.is_valid):
            return scalar.as_py()
    except (ValueError, KeyError, OverflowError):
        pass
    if isinstance(scalar, pa.StructScalar):
        return {name: _value(each) for name, each in scalar.items()}
    if isinstance(scalar, pa.ListScalar):
        return [_value(each) for each in scalar.values]
    try:
        return scalar.cast(pa.string()).as_py()
    except pa.ArrowException:
        return str(scalar.value)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(key): _json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(each) for each in value]
    return str(value)
