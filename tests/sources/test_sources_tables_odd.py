"""Tables as people have them: what can be read is read, the rest is counted by cause."""

from __future__ import annotations

import codecs
import csv
import json
from pathlib import Path

import pytest

from t2i.errors import DataError
from t2i_pipelines import table_files
from t2i_pipelines.table_files import COLUMNS, NESTED, NOT_JSON, NOT_TEXT, NOT_UTF8
from t2i_pipelines.tables import Table, json_records, open_table, text_column

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def opened(path: Path, **columns) -> Table:
    return open_table(str(path), path.parent, {"caption"}, **columns)


def captions(table: Table) -> list[str | None]:
    return [caption for part in table.slices(2) for caption in part["caption"].to_pylist()]


BEGINNINGS = [
    '"Hello" she said',
    '"never closed',
    'a "quoted" word',
    '"',
    '""',
    '"a" or "b"',
    "plain",
    '"""x',
]


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_captions_that_begin_with_a_quotation_mark(tmp_path, suffix):
    """As MS COCO's or CC12M's tables have them: no quotes of the format's."""
    separator = "\t" if suffix == ".tsv" else ","
    rows = [f"{i}.jpg{separator}{text}" for i, text in enumerate(BEGINNINGS)]
    (tmp_path / f"t{suffix}").write_text("\n".join([f"path{separator}caption", *rows]) + "\n")
    table = opened(tmp_path / f"t{suffix}")
    assert table.rows == len(BEGINNINGS)
    assert captions(table) == BEGINNINGS
    assert not table.unusable


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tables_with_quotes_of_the_format_s(tmp_path, suffix, quoting):
    """As pandas writes them."""
    texts = [
        "first\nof some, lines\tof text,\nx,y\tz",
        *BEGINNINGS,
        "a\ttab, and a comma",
        "two\nlines",
        '"quoted"\nlines,\n\t"',
        'end "',
        "\n\nx\n",
    ]
    with (tmp_path / f"t{suffix}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", quoting=quoting)
        writer.writerows([("path", "caption", "n"), *((f"{i}.jpg", text, i) for i, text in enumerate(texts))])
    table = opened(tmp_path / f"t{suffix}")
    assert captions(table) == texts
    assert not table.unusable


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lines_within_quotes_may_look_like_rows(tmp_path, separator):
    """Lines of text that have as many separators as rows have."""
    texts = [f"one\nthree{separator} four\nfive{separator} six {i}" for i in range(9)]
    path = tmp_path / ("t.csv" if separator == "," else "t.tsv")
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(
            [("path", "caption"), *((i, text) for i, text in enumerate(texts))]
        )
    assert captions(opened(path)) == texts


def test_one_bad_row_does_not_change_what_quotation_marks_mean(tmp_path):
    (tmp_path / "t.tsv").write_text('path\tcaption\na\t"x" y\nb\nc\t"z\nd\tlast\te\nf\tend\n')
    table = opened(tmp_path / "t.tsv")
    assert captions(table) == ['"x" y', '"z', "end"]
    assert table.unusable == {COLUMNS: 2}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_field_of_any_length(tmp_path, end):
    """Python's csv refuses 131,073 characters."""
    long = "x" * 1_000_000
    (tmp_path / "t.csv").write_bytes(f"path,caption{end}a,{long}{end}b,short{end}".encode())
    assert captions(opened(tmp_path / "t.csv")) == [long, "short"]


def test_captions_that_are_null_in_some_rows(tmp_path):
    values = ["a", None, "c"]
    pq.write_table(pa.table({"caption": values}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"caption": value}) + "\n" for value in values))
    (tmp_path / "absent.jsonl").write_text('{"caption": "a"}\n{"n": 1}\n{"caption": "c"}\n')
    for name in ("t.parquet", "t.jsonl", "absent.jsonl"):
        assert captions(opened(tmp_path / name)) == values


TEXT_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.binary()),
    pa.dictionary(pa.int16(), pa.large_string()),
]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_of_every_type_of_a_parquet(tmp_path, kind):
    values = ["ein Bild, größer", None, ""]
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_bytes = "binary" in str(plain)
    column = pa.array([value.encode() if is_bytes and value else value for value in values], plain)
    column = column.dictionary_encode().cast(kind) if kind is not plain else column
    pq.write_table(pa.table({"caption": column, "picture": pa.array([b"x"] * 3)}), tmp_path / "t.parquet")
    table = opened(tmp_path / "t.parquet")
    assert text_column(table, "caption") == "caption"
    assert captions(table) == values
    assert table.left_out == ("picture",)


@pytest.mark.parametrize(
    "kind", [pa.binary_view(), pa.binary(3), pa.list_(pa.struct([("b", pa.large_binary())]))]
)
def test_whole_pictures_are_left_out_whatever_their_type(tmp_path, kind):
    values = [[{"b": b"abc"}]] if pa.types.is_list(kind) else [b"abc"]
    pq.write_table(pa.table({"caption": ["a"], "picture": pa.array(values, kind)}), tmp_path / "t.parquet")
    assert opened(tmp_path / "t.parquet").left_out == ("picture",)


def test_what_is_not_utf8_is_null_and_counted(tmp_path):
    latin = "größer".encode("latin-1")
    pq.write_table(pa.table({"caption": pa.array([b"a", latin, b"c"])}), tmp_path / "t.parquet")
    damaged = pa.array([b"a", latin, b"c"]).cast(pa.binary())
    damaged = pa.StringArray.from_buffers(3, *damaged.buffers()[1:])  # says that it is UTF-8
    pq.write_table(pa.table({"caption": damaged}), tmp_path / "damaged.parquet")
    (tmp_path / "t.csv").write_bytes(b"caption,n\na,1\n" + latin + b",2\nc,3\n")
    (tmp_path / "t.jsonl").write_bytes(
        b'{"caption": "a"}\n{"caption": "' + latin + b'"}\n{"caption": "c"}\n{"caption": "\\ud83d"}\n'
    )
    for name, more in (("t.parquet", 0), ("damaged.parquet", 0), ("t.csv", 0), ("t.jsonl", 1)):
        table = opened(tmp_path / name)
        assert captions(table) == ["a", None, "c", *[None] * more]
        assert table.unusable == {NOT_UTF8: 1 + more}


def test_names_of_files_need_not_be_utf8(tmp_path):
    name = "größer.jpg".encode("latin-1")
    pq.write_table(pa.table({"path": pa.array([name]), "caption": ["a"]}), tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_bytes(b"path,caption\n" + name + b",a\n")
    (tmp_path / "t.jsonl").write_bytes(b'{"path": "' + name + b'", "caption": "a"}\n')
    escaped = json.dumps({"path": name.decode("utf-8", "surrogateescape"), "caption": "a"})
    (tmp_path / "escaped.jsonl").write_text(escaped)
    for table in ("t.parquet", "t.csv", "t.jsonl", "escaped.jsonl"):
        found = opened(tmp_path / table, path_columns={"path"})
        assert [part["path"].to_pylist() for part in found.slices(9)] == [[name]]
        assert not found.unusable


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_byte_order_marks(tmp_path, suffix, encoding):
    separator = "\t" if suffix == ".tsv" else ","
    text = f'caption{separator}n\n"größer" 🎈{separator}1\n'
    if suffix == ".jsonl":
        text = json.dumps({"caption": '"größer" 🎈', "n": 1}, ensure_ascii=False) + "\n"
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    (tmp_path / f"t{suffix}").write_bytes(mark + text.encode(encoding))
    table = opened(tmp_path / f"t{suffix}")
    assert [part.to_pylist() for part in table.slices(9)] == [[{"caption": '"größer" 🎈', "n": 1}]]


def test_lines_of_json_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "JSON_ROWS", 2)
    lines = [
        '{"caption": "a"}',
        "",
        "{",
        "[1]",
        '{"caption": "b", "n": 1}',
        "null",
        "[" * 100_000,
        "   ",
        '{"n": 2}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, ""]))
    table = opened(tmp_path / "t.jsonl")
    assert table.rows == 3
    assert [row for part in table.slices(9) for row in part.to_pylist()] == [
        {"caption": "a", "n": None},
        {"caption": "b", "n": 1},
        {"caption": None, "n": 2},
    ]
    assert table.unusable == {NOT_JSON: 4}


def test_values_of_several_types(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "JSON_ROWS", 2)
    records = [
        {"caption": "a", "mixed": 1, "big": 2**62 + 1, "n": 1},
        {"caption": 7, "mixed": [2], "big": 1.5, "n": None},
        {"caption": ["b", "c"], "mixed": "x", "big": 2**70, "n": 0.5},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = opened(tmp_path / "t.jsonl")
    rows = [row for part in table.slices(9) for row in part.to_pylist()]
    assert [row["caption"] for row in rows] == ["a", "7", None]
    assert [row["mixed"] for row in rows] == ["1", "[2]", "x"]
    assert [float(row["big"]) for row in rows] == [2.0**62, 1.5, 2.0**70]
    assert [row["n"] for row in rows] == [1.0, None, 0.5]
    assert table.unusable == {NOT_TEXT: 1}
    (tmp_path / "lists.jsonl").write_text('{"caption": ["a"]}\n')
    with pytest.raises(DataError, match=r"Column caption of .* is list<.*>; allowed: text"):
        text_column(opened(tmp_path / "lists.jsonl"), "caption")


def test_a_suffix_in_capitals(tmp_path):
    (tmp_path / "T.CSV").write_text("caption\na\n")
    assert captions(opened(tmp_path / "T.CSV")) == ["a"]


def test_moments_that_python_does_not_know_are_text():
    """Such as pandas writes, in nanoseconds."""
    moment = pa.timestamp("ns", "UTC")
    columns = {
        "caption": ["a", "b"],
        "at": pa.array([1, None], moment),
        "far": pa.array([2**62, 0], pa.timestamp("s")),
        "took": pa.array([1, 2_000], pa.duration("ns")),
        "nowhere": pa.array([0, None], pa.timestamp("us", "No/Where")),
        "nested": pa.array([[{"at": 1}], None], pa.list_(pa.struct([("at", moment)]))),
    }
    first, second = json_records(pa.table(columns))
    assert first["at"] == "1970-01-01 00:00:00.000000001Z"
    assert first["nested"] == [{"at": "1970-01-01 00:00:00.000000001Z"}]
    assert (first["took"], second["took"]) == ("1", "0:00:00.000002")
    assert (second["at"], second["nested"], second["far"]) == (None, None, "1970-01-01 00:00:00")
    json.dumps([first, second])


def test_lines_that_are_nested_too_deep_count(tmp_path):
    nested = [{"caption": "x", "d": json.loads("[" * depth + "]" * depth)} for depth in (49, 50, 400)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, nested)) + '\n{"caption": "plain"}\n')
    table = opened(tmp_path / "t.jsonl")
    assert captions(table) == ["x", "plain"]
    assert table.unusable == {NESTED: 2}
