"""The metadata of one shard: the `.parquet` beside it and the columns that `t2i data score` added, or, where it was
packed by hand, the JSON of its samples."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i.data.captions import parse_metadata
from t2i.data.compressed import MAX_UNPACKED_GIB, is_compressed, unpack
from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.data.members import member
from t2i.data.sources import SourceError, beside, check_is_file, copy, is_local, local_path, read_bytes, size
from t2i.errors import DataError

from .optional import need
from .places import printable
from .table_files import line, plain_type

END_BYTES = 1 << 20
TEXT = {"key", "caption", "text", "url", "status"}  # even as bytes


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The path of a local shard; a remote one is copied to a temporary file for the length of the block, and a
    compressed one unpacked to one. Raises DataError."""
    with contextlib.ExitStack() as stack:
        path = local_path(url) if is_local(url) else _temporary(stack)
        if not is_local(url):
            copy(url, path)
        try:
            check_is_file(path)
        except OSError as error:
            raise SourceError(url, str(error.strerror)) from error
        with contextlib.suppress(FileNotFoundError, PermissionError):  # who reads it says so
            file = stack.enter_context(path.open("rb")) if path.is_file() else None
            if file is not None and is_compressed(file, url):
                path = _temporary(stack)
                unpack(file, url, path, int(MAX_UNPACKED_GIB * 2**30))
        yield path


def _temporary(stack: contextlib.ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="t2i-"))) / "shard.tar"


def identity(url: str) -> str:
    """Changes with the shard: its size, and of a local one a digest of its ends, as small tar files of different
    samples are padded to the same size. Raises SourceError, OSError."""
    length = size(url)
    if length is None:
        return ""
    if not is_local(url):
        return f"{length} "
    digest = hashlib.sha256()
    check_is_file(local_path(url))
    with local_path(url).open("rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(0, length - END_BYTES))
        digest.update(file.read(END_BYTES))
    return f"{length} {digest.hexdigest()}"


def scan(path: Path, url: str) -> ShardIndex:
    """What the tar at `path`, a copy of `url`, holds. Raises DataError where it cannot be read, or tables and
    selections cannot name its samples."""
    try:
        with path.open("rb") as file:
            index = ShardIndex.scan(url, file.fileno())
    except OSError as error:
        raise DataError(f"Shard {url} cannot be read: {error.strerror or error}.") from error
    for key in index.keys:
        if printable(key) != key:
            raise DataError(
                f"Shard {url} has a sample {key!a}, which is not UTF-8; allowed: names in UTF-8, as in tables."
            )
    return index


def first_rows(index: ShardIndex) -> dict[str, int]:
    """key -> its row; where a key comes twice, the first, as the second is the flaw."""
    return {key: row for row, key in reversed(list(enumerate(index.keys)))}


def metadata_of(url: str) -> tuple[Any, bool]:
    """An Arrow table with a row for each sample, with a column `key`, and whether it stood in a `.parquet`.

    Columns of `00000.scores.parquet` are joined by key; where both have a column, the scores' stands: it is the newer
    one. Raises DataError where a file cannot be read or has no column `key`.
    """
    table = _parquet_beside(url, ".parquet")
    packed = table is not None
    if table is None:
        with local_copy(url) as path:
            table = _from_members(path, url)
    scores = _parquet_beside(url, ".scores.parquet")
    return (table if scores is None else _joined(table, scores)), packed


def _parquet_beside(url: str, suffix: str) -> Any | None:
    pa, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    place = beside(url, suffix)
    if not place:
        return None
    try:
        table = parquet.read_table(pa.BufferReader(read_bytes(place)))
        for at, each in enumerate(table.schema):
            kind = plain_type(each.type, each.name.lower() in TEXT)
            if each.name == "key" or kind != each.type:
                table = table.set_column(
                    at, each.name, table[at].cast(pa.string() if each.name == "key" else kind)
                )
    except SourceError as error:
        if error.missing:
            return None
        raise
    except pa.ArrowException as error:
        raise DataError(f"{place} is not a parquet file that can be read: {line(error)}.") from error
    if "key" not in table.column_names:
        raise DataError(f"{place} has no column key; it has {', '.join(table.column_names)}.")
    return table


def _joined(table: Any, scores: Any) -> Any:
    compute = need("pyarrow.compute", "data")
    rows = compute.index_in(table["key"], value_set=scores["key"].combine_chunks())
    for name in scores.column_names:
        if name != "key":
            same = [each for each in table.column_names if each.lower() == name.lower()]
            table = table.drop_columns(same).append_column(name, scores[name].take(rows))
    return table


def _from_members(path: Path, url: str) -> Any:
    """From the members of the tar at `path`. A sample whose JSON or tar member is bad gets a status that says so."""
    pa = need("pyarrow", "data")
    index = scan(path, url)
    rows: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, key in enumerate(index.keys):
            row: dict[str, Any] = {}
            try:
                if number in index.flaws:
                    raise BadSample(index.flaws[number], key)
                members = index.read(file.fileno(), number, ("json", "txt"))
                row = parse_metadata(members, key)
                row.setdefault("status", "success")
                text = member(members, ("txt",))
                if "caption" not in row and text is not None:
                    row["caption"] = members[text].decode("utf-8-sig").strip()
            except BadSample as error:
                row["status"] = error.cause
            except UnicodeDecodeError:
                row["status"] = "caption"
            except OSError:  # of this sample: too large, or not what its header says
                row["status"] = "unreadable"
            rows.append({**row, "key": key})
    names = dict.fromkeys(["key", "status", *(name for row in rows for name in row)])
    return pa.table({printable(name): _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> Any:
    """Lists and objects, values of several types and numbers beyond 64 bits as JSON text; ? for halves of characters,
    which JSON can spell."""
    pa = need("pyarrow", "data")
    values = [printable(value) if isinstance(value, str) else value for value in values]
    if not any(isinstance(value, list | dict) for value in values):
        with contextlib.suppress(pa.ArrowException, OverflowError):
            return pa.array(values)
    return pa.array(
        [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    )
