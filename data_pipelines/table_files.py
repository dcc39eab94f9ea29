"""One file of a table: its columns, its rows, and what of them cannot be used, in bounded memory."""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i.data.captions import MAX_NESTING, is_deep
from t2i.errors import DataError

from .optional import arrow_file, need

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
CSV_BLOCK_BYTES = 8 << 20  # read at once; no row can be longer
JSON_ROWS = PARQUET_ROWS = 4_096  # read at once
# What a .csv column becomes whose first block looked like something that a later value is not.
WIDER = {"null": "int64", "int64": "double"}
CSV_CONVERSION = re.compile(r"In CSV column #(\d+):.*?conversion error to (\w+)")
COLUMNS, NOT_JSON = "rows with another number of columns", "lines that are no JSON objects"
NESTED = f"lines of JSON nested deeper than {MAX_NESTING}"
NOT_UTF8, NOT_TEXT = "values that are not UTF-8", "values that are not text"


@dataclass(frozen=True)
class TableFile:
    """text, paths: lower-case names of columns that are text whatever they look like, and of those that name files:
    these are bytes, as names of files need not be UTF-8"""

    path: Path
    text: Collection[str] = ()
    paths: Collection[str] = ()
    unusable: Counter[str] = field(default_factory=Counter)

    @property
    def suffix(self) -> str:
        return self.path.suffix.lower()

    def look(self) -> tuple[pa.Schema, int]:
        """The columns and the number of rows that can be read; counts the others. Raises DataError."""
        with self._reading():
            if self.suffix == ".parquet":
                with self._open_parquet() as file:
                    return self._plain(file.schema_arrow), file.metadata.num_rows
            if self.suffix == ".jsonl":
                return self._look_at_json()
            return self._look_at_csv()

    def batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows with the columns of `schema`: null where the file lacks one, and where a value is not UTF-8, which
        is counted. Raises DataError."""
        with self._reading():
            if self.suffix == ".parquet":
                with self._open_parquet() as file:
                    names = [name for name in schema.names if name in file.schema_arrow.names]
                    for batch in file.iter_batches(PARQUET_ROWS, columns=names):
                        yield self._conformed(batch, schema)
            elif self.suffix == ".jsonl":
                for records in self._json_records(Counter()):
                    yield self._conformed(self._json_batch(records, schema, self.unusable), schema)
            else:
                with self._open_csv({each.name: each.type for each in schema}, Counter()) as reader:
                    yield from (self._conformed(batch, schema) for batch in reader)

    @contextmanager
    def _open_parquet(self) -> Iterator[Any]:
        with arrow_file(self.path) as source:
            yield need("pyarrow.parquet", "data").ParquetFile(source, pre_buffer=False)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        pa = need("pyarrow", "data")
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            why = line(error)
            if "straddling" in why:
                why = (
                    f"a row is longer than {CSV_BLOCK_BYTES >> 20} MiB, as after a quote that is never closed"
                )
            raise DataError(f"{self.path} cannot be read: {why}.") from error

    def _plain(self, schema: pa.Schema) -> pa.Schema:
        """Without pandas' notes, with the values of dictionaries in their place, and one type for text."""
        pa = need("pyarrow", "data")
        return pa.schema([pa.field(each.name, self._type(each.name, each.type)) for each in schema])

    def _type(self, name: str, kind: pa.DataType) -> pa.DataType:
        return plain_type(kind, name.lower() in self.text, name.lower() in self.paths)

    def _conformed(self, batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        pa, compute = need("pyarrow", "data"), need("pyarrow.compute", "data")
        columns = []
        for each in schema:
            if each.name not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, each.type))
                continue
            column = batch.column(each.name)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            options = compute.CastOptions(target_type=each.type, allow_invalid_utf8=True)
            columns.append(self._readable(compute.cast(column, options=options)))
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def _readable(self, column: pa.Array) -> pa.Array:
        """With null in the place of what is not UTF-8."""
        pa = need("pyarrow", "data")
        try:
            column.validate(full=True)
            return column
        except pa.ArrowInvalid:
            values = [_value(each) for each in column]
        found = pa.array(values, column.type)
        self.unusable[NOT_UTF8] += found.null_count - column.null_count
        return found

    def _encoding(self) -> str:
        with self.path.open("rb") as file:
            begin = file.read(2)
        return "utf-16" if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"

    # Tables with separators

    @property
    def _separator(self) -> str:
        return "\t" if self.suffix == ".tsv" else ","

    def _look_at_csv(self) -> tuple[pa.Schema, int]:
        pa = need("pyarrow", "data")
        with self._open_csv({}, Counter()) as reader:
            names = reader.schema.names
        types = {name: pa.string() for name in names if name.lower() in self.text}
        types |= {name: pa.binary() for name in names if name.lower() in self.paths}
        while True:
            rows, left_out = 0, Counter[str]()
            try:
                with self._open_csv(types, left_out) as reader:
                    for batch in reader:
                        rows += batch.num_rows
                    self.unusable.update(left_out)
                    return reader.schema, rows
            except pa.ArrowInvalid as error:
                told = CSV_CONVERSION.search(str(error))
                if told is None or types.get(name := names[int(told[1])]) == pa.string():
                    raise
                types[name] = pa.type_for_alias(WIDER.get(told[2], "string"))

    def _open_csv(
        self, types: dict[str, pa.DataType], left_out: Counter[str], quoted: bool | None = None
    ) -> Any:
        arrow = need("pyarrow.csv", "data")

        def count(row: Any) -> str:
            left_out[COLUMNS] += 1
            return "skip"

        if quoted is None:
            quoted = self._is_quoted
        return arrow.open_csv(
            arrow_file(self.path),
            arrow.ReadOptions(block_size=CSV_BLOCK_BYTES, encoding=self._encoding().removesuffix("-sig")),
            arrow.ParseOptions(
                delimiter=self._separator,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=count,
            ),
            arrow.ConvertOptions(column_types=types, check_utf8=False),
        )

    @cached_property
    def _is_quoted(self) -> bool:
        """Whether quotation marks hold fields together, or are text, as in a caption that begins with one. They hold
        fields together where all that begin with one are quoted by the rules, else where fewer rows are lost so."""
        separator = self._separator
        columns = good = bad = odd = 0
        with self.path.open(encoding=self._encoding(), errors="replace") as file:
            while row := file.readline(CSV_BLOCK_BYTES):
                if not (row := row.rstrip("\r\n")):
                    continue
                columns = columns or row.count(separator) + 1
                if row.count(separator) + 1 != columns:
                    bad += 1
                    continue
                good += 1
                if row[0] == '"' or f'{separator}"' in row:
                    odd += any(map(_is_odd, row.split(separator)))
        if not odd or columns == 1 or self._is_well_quoted():
            return True
        return bool(bad) and self._quoted_rows() + 1 >= good

    def _is_well_quoted(self) -> bool:
        limit = csv.field_size_limit(CSV_BLOCK_BYTES)  # that of the whole process
        try:
            with self.path.open(encoding=self._encoding(), errors="replace", newline="") as file:
                for _ in csv.reader(file, delimiter=self._separator, strict=True):
                    pass
        except csv.Error:
            return False
        finally:
            csv.field_size_limit(limit)
        return True

    def _quoted_rows(self) -> int:
        """How many rows there are if quotation marks hold fields together."""
        pa = need("pyarrow", "data")
        try:
            with self._open_csv({}, Counter(), quoted=True) as reader:
                types = dict.fromkeys(reader.schema.names, pa.binary())
            with self._open_csv(types, Counter(), quoted=True) as reader:
                return sum(batch.num_rows for batch in reader)
        except pa.ArrowInvalid:  # a mark that is never closed
            return 0

    # Lines of JSON

    def _look_at_json(self) -> tuple[pa.Schema, int]:
        pa = need("pyarrow", "data")
        types: dict[str, Any] = {}
        rows = 0
        for records in self._json_records(self.unusable):
            for each in self._json_batch(records, None, Counter()).schema:
                types[each.name] = _wider(types.get(each.name, each.type), each.type)
            rows += len(records)
        return pa.schema([pa.field(name, self._type(name, kind)) for name, kind in types.items()]), rows

    def _json_records(self, left_out: Counter[str]) -> Iterator[list[dict[str, Any]]]:
        """Up to JSON_ROWS at a time. Bytes that are not UTF-8 are there as halves of surrogate pairs."""
        with self.path.open(encoding=self._encoding(), errors="surrogateescape") as file:
            lines = (
                record for row in file if row.strip() and (record := _json_object(row, left_out)) is not None
            )
            while part := list(itertools.islice(lines, JSON_ROWS)):
                yield part

    def _json_batch(
        self, records: list[dict[str, Any]], schema: pa.Schema | None, unusable: Counter[str]
    ) -> pa.RecordBatch:
        """With the types of `schema`, or with those that the values have; of several types, as JSON text."""
        pa = need("pyarrow", "data")
        names = dict.fromkeys(itertools.chain.from_iterable(records)) if schema is None else schema.names
        columns = {}
        for name in names:
            values = [record.get(name) for record in records]
            kind = None if schema is None else schema.field(name).type
            wants_text = name.lower() in self.paths or name.lower() in self.text
            if wants_text and (
                kind in (pa.string(), pa.binary()) or any(isinstance(value, str) for value in values)
            ):
                unusable[NOT_TEXT] += sum(isinstance(value, list | dict) for value in values)
                values = [_text(value) for value in values]
            if name.lower() in self.paths:
                values = [_file_name(value, unusable) for value in values]
            columns[name] = _json_array(values, kind, unusable)
        return pa.RecordBatch.from_pydict(columns)


def plain_type(kind: pa.DataType, text: bool, path: bool = False) -> pa.DataType:
    """The type of a column of a .parquet without dictionaries, and the same for all kinds of text.
    text: also where it is text as bytes; path: as bytes wherever it is text"""
    pa = need("pyarrow", "data")
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = kind in (pa.string(), pa.large_string(), pa.string_view())
    is_bytes = kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    if path and (is_text or is_bytes):
        return pa.binary()
    return pa.string() if is_text or (is_bytes and text) else kind


def line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _text(value: Any) -> str | None:
    """Numbers as they are spelt; None for what is no text."""
    if value is None or isinstance(value, list | dict):
        return None
    return value if isinstance(value, str) else json.dumps(value)


def _file_name(value: Any, unusable: Counter[str]) -> Any:
    try:
        return os.fsencode(value) if isinstance(value, str) else value
    except UnicodeEncodeError:
        unusable[NOT_UTF8] += 1
        return None


def _is_odd(text: str) -> bool:
    """Whether a field begins with a quotation mark that is not one of the format."""
    if not text.startswith('"'):
        return False
    return len(text) < 2 or not text.endswith('"') or '"' in text[1:-1].replace('""', "")


def _json_object(row: str, left_out: Counter[str]) -> dict[str, Any] | None:
    try:
        record = json.loads(row)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        left_out[NOT_JSON] += 1
        return None
    if is_deep(record):
        left_out[NESTED] += 1
        return None
    return record


def _json_array(values: list[Any], kind: pa.DataType | None, unusable: Counter[str]) -> pa.Array:
    pa = need("pyarrow", "data")
    if kind is not None and pa.types.is_floating(kind):
        values = [float(value) if isinstance(value, int) else value for value in values]
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        encodable = [value if _is_unicode(value) else None for value in values]
        unusable[NOT_UTF8] += encodable.count(None) - values.count(None)
        return _json_array(encodable, kind, unusable)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        texts = [value if isinstance(value, str | None) else json.dumps(value) for value in values]
        return _json_array(texts, pa.string(), unusable)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """A type that holds the values of both; text where there is none."""
    pa = need("pyarrow", "data")
    try:
        schemas = [pa.schema([("", one)]), pa.schema([("", other)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.string()
