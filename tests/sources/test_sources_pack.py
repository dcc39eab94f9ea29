"""Pictures of one's own become shards that training reads, and what cannot is named."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from t2i.errors import ConfigError, DataError
from t2i_pipelines import pack as module
from t2i_pipelines.pack import pack
from t2i_pipelines.rows import rows_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(path: Path, caption: str | None = None, size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def read(folder: Path) -> list[dict]:
    return list(wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


def packed(source: Path, out: Path, samples_per_shard: int = 1000) -> module.Report:
    return pack(rows_of(source), out, samples_per_shard, lambda done: None)


def test_a_folder(tmp_path):
    jpg = picture(tmp_path / "in/b.JPG", " a red field \n")
    picture(tmp_path / "in/deep/a.bmp", "ein rotes Bild, größer", (9, 2))
    report = packed(tmp_path / "in", tmp_path / "out")
    assert (report.packed, report.shards, report.failed) == (2, 1, {})
    first, second = read(tmp_path / "out")
    assert first["jpg"] == jpg.read_bytes()  # not encoded again
    assert first["txt"].decode() == "a red field"
    assert Image.open(io.BytesIO(second["png"])).size == (9, 2)
    description = json.loads(second["json"])
    assert description["caption"] == "ein rotes Bild, größer"
    assert (description["width"], description["height"]) == (9, 2)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table(tmp_path, kind):
    picture(tmp_path / "pictures/a.png")
    record = {"file": "pictures/a.png", "text": "one, two", "score": "5.5"}
    table = tmp_path / f"table.{kind}"
    as_csv = 'file,text,score\npictures/a.png,"one, two",5.5\n'
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), table)
    else:
        table.write_text(as_csv if kind == "csv" else json.dumps(record) + "\n")
    pack(rows_of(table, "file", "text"), tmp_path / "out", 10, lambda done: None)
    (sample,) = read(tmp_path / "out")
    assert sample["txt"] == b"one, two"
    assert json.loads(sample["json"])["score"] == (5.5 if kind == "csv" else "5.5")
    with pytest.raises(DataError, match=r"has no column caption; it has file, text, score"):
        rows_of(table, "file")


def test_what_is_bad_is_left_out_and_named(tmp_path):
    picture(tmp_path / "in/a.png", "good")
    picture(tmp_path / "in/b.png")
    picture(tmp_path / "in/c.png", "  ")
    (picture(tmp_path / "in/d.png", "broken")).write_bytes(b"not a picture")
    report = packed(tmp_path / "in", tmp_path / "out")
    assert (report.packed, dict(report.failed)) == (1, {"caption": 2, "image": 1})
    stats = json.loads((tmp_path / "out/00000_stats.json").read_text())
    assert [Path(each["path"]).name for each in stats["failed"]] == ["b.png", "c.png", "d.png"]
    assert (stats["count"], stats["successes"]) == (4, 1)


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    for i in range(7):
        picture(tmp_path / f"in/{i}.png", f"number {i}")
    packed(tmp_path / "in", tmp_path / "whole", 2)
    real, calls = module._sample, []

    def stops(row, extension):
        calls.append(row)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(row, extension)

    monkeypatch.setattr(module, "_sample", stops)
    with pytest.raises(KeyboardInterrupt):
        packed(tmp_path / "in", tmp_path / "out", 2)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "00000.parquet",
        "00000.tar",
        "00000_stats.json",
    ]
    report = packed(tmp_path / "in", tmp_path / "out", 2)
    assert len(calls) == 4 + 5  # none of the first shard again
    assert (report.packed, report.shards, report.skipped) == (7, 4, 1)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_shards_of_other_rows_are_left_alone(tmp_path):
    picture(tmp_path / "in/a.png", "first")
    packed(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out/00000.tar").read_bytes()
    picture(tmp_path / "in/b.png", "second")
    with pytest.raises(DataError, match="was not packed from these rows"):
        packed(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/00000.tar").read_bytes() == before


def test_shards_of_rows_that_are_gone_are_not_passed_over(tmp_path):
    """The first shard is still that of the first rows."""
    for name in "abc":
        picture(tmp_path / f"in/{name}.png", name)
    pack(rows_of(tmp_path / "in"), tmp_path / "out", 2, lambda done: None)
    (tmp_path / "in/c.png").unlink()
    with pytest.raises(DataError, match=r"00001\.tar is not of these rows, which fill 1 shard;"):
        pack(rows_of(tmp_path / "in"), tmp_path / "out", 2, lambda done: None)


def test_what_is_no_source(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"path": "a"\n')
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("absent.csv", "does not exist"),
        ("notes.doc", "allowed: a folder"),
        ("bad.jsonl", r"has no rows that can be read \(lines that are no JSON objects: 1\)"),
        ("empty", "holds no pictures"),
    ):
        with pytest.raises(DataError, match=words):
            rows_of(tmp_path / name)
    picture(tmp_path / "in/a.png", "x")
    with pytest.raises(DataError, match="samples_per_shard is 0; allowed: 1 to 10000"):
        packed(tmp_path / "in", tmp_path / "out", 0)


def test_the_table_beside_a_shard_says_what_its_json_says(tmp_path):
    """Read by duckdb, as `t2i data filter` does."""
    duckdb = pytest.importorskip("duckdb")
    for name in "abcd":
        picture(tmp_path / f"{name}.png", size=(6, 4))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    records = [
        {
            "path": f"{name}.png",
            "caption": f"the {name}",
            "score": score,
            "width": 99,
            "mixed": mixed,
            "none": None,
        }
        for name, score, mixed in zip("abcd", (1, 2, 3.5, None), (1, "x", [2], None), strict=True)
    ]
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = packed(table, tmp_path / "out", 2)
    assert (report.packed, report.tables) == (3, True)
    schemas = [pq.read_schema(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert schemas[0].equals(schemas[1])
    rows = (
        duckdb.sql(f"select * from '{tmp_path}/out/*.parquet' order by key").fetch_arrow_table().to_pylist()
    )
    assert [(row["key"], row["status"]) for row in rows] == [
        ("000000000", "success"),
        ("000000001", "failed"),
        ("000010000", "success"),
        ("000010001", "success"),
    ]
    assert rows[1]["error_message"] == "image: not a picture in a known format"
    assert (rows[1]["caption"], rows[1]["source"], rows[1]["width"]) == ("the b", "b.png", None)
    assert [row["mixed"] for row in rows] == ["1", "x", "[2]", None]
    for sample, row in zip(read(tmp_path / "out"), [rows[0], *rows[2:]], strict=True):
        told = json.loads(sample["json"])
        assert told.keys() == row.keys()
        assert (row["width"], row["table_width"]) == (6, 99)
        told["mixed"] = row["mixed"]
        assert told == row


def test_without_pyarrow_there_is_no_table_and_that_is_said(tmp_path, monkeypatch, capsys):
    from t2i_cli.data.pack import run

    picture(tmp_path / "in/a.png", "first")
    packed(tmp_path / "in", tmp_path / "whole")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    run([str(tmp_path / "in"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "1 of 1 picture packed in 1 shard" in said
    assert "No .parquet beside the shards, as pyarrow is missing: pip install 't2i[data]'" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00000.tar", "00000_stats.json"}
    assert (tmp_path / "out/00000.tar").read_bytes() == (tmp_path / "whole/00000.tar").read_bytes()
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"needs the package pyarrow; install it with `pip install 't2i\[data\]'`"
    ):
        rows_of(tmp_path / "t.parquet")


def test_a_photograph_that_a_phone_took_is_kept_as_it_is(tmp_path):
    """Several pictures in one JPEG file: Pillow calls it MPO."""
    (tmp_path / "in").mkdir()
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "in/a.jpg", "MPO", save_all=True, append_images=[second])
    (tmp_path / "in/a.txt").write_text("red")
    packed(tmp_path / "in", tmp_path / "out")
    (sample,) = read(tmp_path / "out")
    assert sample["jpg"] == (tmp_path / "in/a.jpg").read_bytes()
