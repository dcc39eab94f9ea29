"""Tables are read in slices, against pyarrow's own readers of whole files, with types that hold for every row."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2i.errors import DataError
from t2i_pipelines import table_files, tables
from t2i_pipelines.tables import Table, open_table, text_column

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RECORDS = [
    {"url": "http://a/1.jpg", "caption": "a, “quoted” \n line", "similarity": 0.5, "id": 1},
    {"url": "http://a/2.jpg", "caption": "", "similarity": 1.0, "id": 2},
    {"url": "http://a/3.jpg", "caption": 'with "quotes"', "similarity": 0.25, "id": 3},
]


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    else:
        separator = "\t" if path.suffix == ".tsv" else ","

        def cell(value) -> str:
            return '"' + value.replace('"', '""') + '"' if isinstance(value, str) else str(value)

        lines = [separator.join(records[0])]
        lines += [separator.join(map(cell, record.values())) for record in records]
        path.write_text("\n".join(lines) + "\n")
    return path


def opened(source: object, tmp_path: Path, text: tuple[str, ...] = ("url", "caption")) -> Table:
    return open_table(str(source), tmp_path / "copies", text)


def everything(table: Table, rows: int = 2) -> list[dict]:
    return [record for part in table.slices(rows) for record in part.to_pylist()]


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_format_says_the_same(tmp_path, suffix):
    table = opened(write(tmp_path / f"table{suffix}", RECORDS), tmp_path)
    assert (table.rows, table.schema.names) == (3, list(RECORDS[0]))
    assert table.schema.field("similarity").type == pa.float64()
    assert [part.num_rows for part in table.slices(2)] == [2, 1]
    assert everything(table) == RECORDS


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=5), rows=st.integers(1, 50))
def test_slices_are_full_whatever_the_files_hold(tmp_path, counts, rows):
    if sum(counts) == 0:
        return
    number = iter(range(sum(counts)))
    for i, count in enumerate(counts):
        part = pa.table({"n": pa.array([next(number) for _ in range(count)], pa.int64())})
        pq.write_table(part, tmp_path / f"{i}.parquet", row_group_size=7)
    for i in range(len(counts), 5):
        (tmp_path / f"{i}.parquet").unlink(missing_ok=True)
    table = opened(tmp_path / "*.parquet", tmp_path)
    parts = [part["n"].to_pylist() for part in table.slices(rows)]
    assert [n for part in parts for n in part] == list(range(sum(counts)))
    assert {len(part) for part in parts[:-1]} <= {rows}
    assert 1 <= len(parts[-1]) <= rows


def test_files_by_braces_and_with_different_columns(tmp_path):
    write(tmp_path / "0.parquet", [{"url": "a", "n": 1}])
    write(tmp_path / "1.csv", [{"url": "b", "n": 1.5, "tag": "x"}])
    table = opened(tmp_path / "{0.parquet,1.csv}", tmp_path)
    assert everything(table) == [{"url": "a", "n": 1.0, "tag": None}, {"url": "b", "n": 1.5, "tag": "x"}]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_type_is_that_of_all_rows_not_of_the_first(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(table_files, "CSV_BLOCK_BYTES", 256)
    monkeypatch.setattr(table_files, "JSON_ROWS", 10)
    values = [*[1] * 50, 2.5, *[3] * 50]
    path = write(tmp_path / f"t{suffix}", [{"v": v, "w": "007" if v == 1 else "a"} for v in values])
    table = opened(path, tmp_path)
    assert table.schema.field("v").type == pa.float64()
    assert table.schema.field("w").type == pa.string()
    assert [record["v"] for record in everything(table, 7)] == values


def test_text_columns_stay_text(tmp_path):
    (tmp_path / "t.csv").write_text("URL,TEXT,n\nhttp://a,007,007\nhttp://b,NA,8\n")
    table = opened(tmp_path / "t.csv", tmp_path, ("url", "text"))
    assert everything(table) == [
        {"URL": "http://a", "TEXT": "007", "n": 7},
        {"URL": "http://b", "TEXT": "NA", "n": 8},
    ]
    assert text_column(table, "caption", "text") == "TEXT"
    with pytest.raises(DataError, match=r"Column n of .*t.csv is int64; allowed: text"):
        text_column(table, "n")
    with pytest.raises(DataError, match=r"t.csv has no column caption; it has URL, TEXT, n"):
        table.find_column("caption")


def test_a_column_is_found_in_any_case(tmp_path):
    table = opened(write(tmp_path / "t.parquet", [{"URL": "a", "Url": "b", "TEXT": "c"}]), tmp_path)
    assert table.find_column("caption", "text") == "TEXT"
    assert table.find_column("Url") == "Url"
    with pytest.raises(DataError, match="has the columns URL, Url; name the one that is meant"):
        table.find_column("url")


def test_a_dictionary_is_its_values(tmp_path):
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"url": column}), tmp_path / "t.parquet")
    table = opened(tmp_path / "t.parquet", tmp_path)
    assert table.schema.field("url").type == pa.string()
    assert [record["url"] for record in everything(table)] == ["a", "b", "a"]


def test_a_table_elsewhere_is_copied_once(tmp_path):
    with fsspec.open("memory://bucket/t.csv", "w") as file:
        file.write("url\na\nb\n")
    assert len(everything(opened("memory://bucket/t.csv", tmp_path))) == 2
    fsspec.filesystem("memory").rm("/bucket/t.csv")
    assert len(everything(opened("memory://bucket/t.csv", tmp_path))) == 2
    assert [path.suffix for path in (tmp_path / "copies").iterdir()] == [".csv"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", "x", "is not a table; allowed: .parquet, .csv, .tsv, .jsonl"),
        ("t.parquet", "x", "t.parquet cannot be read"),
        ("t.csv", "", "t.csv cannot be read: Empty CSV file"),
        ("t.csv", "url\n", "has no rows"),
        ("t.csv", "a,b\n1\n3\n", r"has no rows that can be read \(rows with another number of columns: 2\)"),
        ("t.csv", "a,a\n1,2\n", "two columns of one name: a, a"),
        ("t.jsonl", '[1]\n{"a"\n', r"has no rows that can be read \(lines that are no JSON objects: 2\)"),
    ],
)
def test_what_is_no_table(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        opened(tmp_path / name, tmp_path)


def test_what_is_not_there_or_does_not_fit(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"absent\.csv does not exist"):
        opened(tmp_path / "absent.csv", tmp_path)
    write(tmp_path / "0.parquet", [{"a": 1}])
    write(tmp_path / "1.parquet", [{"a": "x"}])
    with pytest.raises(DataError, match="disagree on a column"):
        opened(tmp_path / "*.parquet", tmp_path)
    monkeypatch.setattr(table_files, "CSV_BLOCK_BYTES", 1 << 20)
    (tmp_path / "open.csv").write_text('a,b\n1,"' + "x,\n" * (1 << 20))
    with pytest.raises(DataError, match="a row is longer than 1 MiB, as after a quote that is never closed"):
        opened(tmp_path / "open.csv", tmp_path)


def test_memory_does_not_grow_with_the_table(tmp_path):
    caption = "x" * 500
    with pq.ParquetWriter(tmp_path / "t.parquet", pa.schema([("caption", pa.string())])) as writer:
        for i in range(40):
            writer.write_table(pa.table({"caption": [f"{i} {j} {caption}" for j in range(2000)]}))
    table = opened(tmp_path / "t.parquet", tmp_path)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    peak = 0
    for part in table.slices(1000):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert part.num_rows == 1000
    assert peak < 10 << 20  # of 40 MiB
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
