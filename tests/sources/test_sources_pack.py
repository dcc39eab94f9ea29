"""Pictures of one's own become shards that training reads, and what cannot is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from t2i.errors import DataError
from t2i_pipelines import pack as module
from t2i_pipelines.pack import pack, rows_of


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


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table(tmp_path, kind):
    picture(tmp_path / "pictures/a.png")
    record = {"file": "pictures/a.png", "text": "one, two", "score": "5.5"}
    table = tmp_path / f"table.{kind}"
    as_csv = 'file,text,score\npictures/a.png,"one, two",5.5\n'
    table.write_text(as_csv if kind == "csv" else json.dumps(record) + "\n")
    pack(rows_of(table, "file", "text"), tmp_path / "out", 10, lambda done: None)
    (sample,) = read(tmp_path / "out")
    assert sample["txt"] == b"one, two"
    assert json.loads(sample["json"])["score"] == "5.5"
    with pytest.raises(DataError, match=r"Row 1 of .* has no caption; it has file, text, score"):
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

    def stops(row):
        calls.append(row)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(row)

    monkeypatch.setattr(module, "_sample", stops)
    with pytest.raises(KeyboardInterrupt):
        packed(tmp_path / "in", tmp_path / "out", 2)
    assert [path.name for path in sorted((tmp_path / "out").glob("[0-9]*"))] == [
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


def test_what_is_no_source(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    (tmp_path / "bad.jsonl").write_text('{"path": "a"\n')
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("absent", "cannot be read"),
        ("notes.doc", "allowed: a folder"),
        ("bad.jsonl", "Line 1 of .* is not JSON"),
        ("empty", "holds no pictures"),
    ):
        with pytest.raises(DataError, match=words):
            rows_of(tmp_path / name)
    picture(tmp_path / "in/a.png", "x")
    with pytest.raises(DataError, match="samples_per_shard is 0; allowed: 1 to 10000"):
        packed(tmp_path / "in", tmp_path / "out", 0)
