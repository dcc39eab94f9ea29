"""Tables of URLs, paths and captions (.parquet, .csv, .tsv, .jsonl), one file or many, in bounded memory."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.data.sources import copy, expand, is_local, local_path
from t2i.errors import DataError
from t2i.files import written_whole

from .optional import need

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
CSV_BLOCK_BYTES = 8 << 20  # read at once; no row can be longer
JSON_ROWS = PARQUET_ROWS = 4_096  # read at once
# What a .csv column becomes whose first block looked like something that a later value is not.
WIDER = {"null": "int64", "int64": "double"}
CSV_CONVERSION = re.compile(r"In CSV column #(\d+):.*?conversion error to (\w+)")
BINARY = re.compile(r"\bbinary\b")  # also within lists and structures


@dataclass(frozen=True)
class Table:
    """One table in one or several files.

    files: local, in order
    schema: what each slice has: all columns of all files, null where a file lacks one
    rows: in all files
    left_out: columns that are never read, as they hold bytes, such as whole pictures
    """

    files: tuple[Path, ...]
    schema: pa.Schema
    rows: int
    left_out: tuple[str, ...] = ()

    def slices(self, rows: int) -> Iterator[pa.Table]:
        """The table in its order, `rows` rows at a time; the last slice may have fewer. Raises DataError."""
        pa = need("pyarrow", "data")
        pending: list[Any] = []
        count = 0
        for batch in itertools.chain.from_iterable(_batches(path, self.schema) for path in self.files):
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
                    f"{self.files[0]} has the columns {', '.join(found)}; name the one that is meant."
                )
            if found:
                return found[0]
        raise DataError(f"{self.files[0]} has no column {names[0]}; it has {', '.join(self.schema.names)}.")


def open_table(source: str, copies: Path, text_columns: Collection[str] = ()) -> Table:
    """Looks at every file of `source`: a path or URL, several by braces (`{000..127}.parquet`) or `*`.

    copies: folder for what is not on this machine. What lies there is not copied again; it is the caller's to remove.
    text_columns: lower-case names of columns of a .csv or .tsv that are text whatever they look like. The types of
        the others are found by reading all of it once: integers, else floating-point numbers, else text.
    Raises DataError where a file is missing or not what its name says, or files disagree on a column's type.
    """
    pa = need("pyarrow", "data")
    files = tuple(itertools.chain.from_iterable(_files(url, copies) for url in expand(source, "table")))
    schemas, rows = [], 0
    for path in files:
        schema, count = _look(path, text_columns)
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{path} has two columns of one name: {', '.join(schema.names)}.")
        schemas.append(schema)
        rows += count
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"The files of {source} disagree on a column: {_line(error)}.") from error
    if rows == 0:
        raise DataError(f"{source} has no rows.")
    left_out = tuple(field.name for field in schema if BINARY.search(str(field.type)))
    return Table(files, pa.schema([field for field in schema if field.name not in left_out]), rows, left_out)


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
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is not a table; allowed: {', '.join(SUFFIXES)}.")
    return path.suffix


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    pa = need("pyarrow", "data")
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        why = _line(error)
        if "straddling" in why:
            why = f"a row is longer than {CSV_BLOCK_BYTES >> 20} MiB, as after a quote that is never closed"
        raise DataError(f"{path} cannot be read: {why}.") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _look(path: Path, text_columns: Collection[str]) -> tuple[pa.Schema, int]:
    """The schema of one file, and its rows."""
    pa = need("pyarrow", "data")
    with _reading(path):
        if path.suffix == ".parquet":
            with need("pyarrow.parquet", "data").ParquetFile(path, pre_buffer=False) as file:
                return _plain(file.schema_arrow), file.metadata.num_rows
        if path.suffix == ".jsonl":
            schema, rows = pa.schema([]), 0
            for batch in _json_batches(path):
                try:
                    schema = pa.unify_schemas([schema, batch.schema], promote_options="permissive")
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    raise DataError(
                        f"A column of {path} holds values of two types: {_line(error)}."
                    ) from error
                rows += batch.num_rows
            return schema, rows
        return _look_at_csv(path, text_columns)


def _plain(schema: pa.Schema) -> pa.Schema:
    """Without pandas' notes, and with the values of dictionaries in their place."""
    pa = need("pyarrow", "data")
    types = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema]
    return pa.schema([pa.field(f.name, kind) for f, kind in zip(schema, types, strict=True)])


def _look_at_csv(path: Path, text_columns: Collection[str]) -> tuple[pa.Schema, int]:
    pa = need("pyarrow", "data")
    with _open_csv(path, {}) as reader:
        names = reader.schema.names
    types = {name: pa.string() for name in names if name.lower() in text_columns}
    while True:
        rows = 0
        try:
            with _open_csv(path, types) as reader:
                for batch in reader:
                    rows += batch.num_rows
                return reader.schema, rows
        except pa.ArrowInvalid as error:
            told = CSV_CONVERSION.search(str(error))
            if told is None or types.get(name := names[int(told[1])]) == pa.string():
                raise
            types[name] = pa.type_for_alias(WIDER.get(told[2], "string"))


def _open_csv(path: Path, types: dict[str, pa.DataType]) -> Any:
    csv = need("pyarrow.csv", "data")
    return csv.open_csv(
        path,
        csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True),
        csv.ConvertOptions(column_types=types),
    )


def _batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of one file, with the columns of `schema`."""
    with _reading(path):
        if path.suffix == ".parquet":
            with need("pyarrow.parquet", "data").ParquetFile(path, pre_buffer=False) as file:
                names = [name for name in schema.names if name in file.schema_arrow.names]
                for batch in file.iter_batches(PARQUET_ROWS, columns=names):
                    yield _conformed(batch, schema)
        elif path.suffix == ".jsonl":
            yield from (_conformed(batch, schema) for batch in _json_batches(path))
        else:
            with _open_csv(path, {field.name: field.type for field in schema}) as reader:
                yield from (_conformed(batch, schema) for batch in reader)


def _conformed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    pa = need("pyarrow", "data")
    columns = [
        batch.column(field.name).cast(field.type)
        if field.name in batch.schema.names
        else pa.nulls(batch.num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _json_batches(path: Path) -> Iterator[pa.RecordBatch]:
    pa = need("pyarrow", "data")
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        while part := list(itertools.islice(lines, JSON_ROWS)):
            records = [json_record(path, number, line) for number, line in part]
            names = dict.fromkeys(itertools.chain.from_iterable(records))
            columns = {}
            for name in names:
                try:
                    columns[name] = pa.array([record.get(name) for record in records])
                except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                    raise DataError(
                        f"Lines {part[0][0]} to {part[-1][0]} of {path} hold values of two types under {name}."
                    ) from error
            yield pa.RecordBatch.from_pydict(columns)


def json_record(path: Path, number: int, line: str) -> dict[str, Any]:
    """One line of a .jsonl. Raises DataError where it is not an object."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"Line {number} of {path} is not JSON: {error}.") from error
    if not isinstance(record, dict):
        raise DataError(f"Line {number} of {path} is a {type(record).__name__}; allowed: an object.")
    return record


def text_column(table: Table, *names: str) -> str:
    """`table.find_column`, where it holds text. Raises DataError."""
    pa = need("pyarrow", "data")
    name = table.find_column(*names)
    kind = table.schema.field(name).type
    if not kind.equals(pa.null()) and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        raise DataError(f"Column {name} of {table.files[0]} is {kind}; allowed: text.")
    return name


def json_records(table: pa.Table) -> list[dict[str, Any]]:
    """The rows in what JSON can hold: numbers that are not finite as None, dates and the like as text."""
    return [_json_value(record) for record in table.to_pylist()]


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
