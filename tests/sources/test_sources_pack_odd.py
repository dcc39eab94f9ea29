"""Folders and tables as people have them: all that can be packed is, and the rest is counted by cause."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from t2i_cli.data.pack import run
from t2i_pipelines import pack as module
from t2i_pipelines.pack import pack
from t2i_pipelines.rows import rows_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(path: Path, caption: str | None = "a", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(len(str(path))).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(small).resize((12, 8)).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def read(folder: Path) -> list[dict]:
    return list(wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))


def sources(folder: Path) -> list[str]:
    return [json.loads(sample["json"])["source"] for sample in read(folder)]


def packed(source: Path, out: Path, **options) -> module.Report:
    return pack(rows_of(source), out, 1000, lambda done: None, **options)


def test_every_kind_of_picture_and_what_is_none(tmp_path, capsys):
    for name, kind in (
        ("a.jfif", "JPEG"),
        ("b.avif", "AVIF"),
        ("c.JPE", "JPEG"),
        ("d.jp2", "JPEG2000"),
        ("e.tga", "TGA"),
    ):
        picture(tmp_path / "in" / name, format=kind)
    for name in ("f.heic", "g.svg", "h.HEIC", "notes.md", "Thumbs.db", "lonely.txt"):
        (tmp_path / "in" / name).write_text("x")
    run([str(tmp_path / "in"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert sources(tmp_path / "out") == ["a.jfif", "b.avif", "c.JPE", "d.jp2", "e.tga"]
    assert f"Passed by in {tmp_path / 'in'}, pictures of a kind that is not read (.heic): 2" in said
    assert "pictures of a kind that is not read (.svg): 1" in said
    assert ", captions without a picture: 1" in said
    assert ", files that are no pictures: 2" in said


def test_linked_folders_are_followed_once_and_not_in_circles(tmp_path):
    picture(tmp_path / "in/real/a.png")
    picture(tmp_path / "elsewhere/b.png")
    picture(tmp_path / "elsewhere/deep/c.png")
    links = {
        "in/1": "elsewhere",
        "in/2": "elsewhere",
        "in/again": "in/real",
        "in/real/up": "in",
        "elsewhere/deep/self": "elsewhere/deep",
        "elsewhere/deep/back": "in",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    (tmp_path / "in/linked.png").symlink_to(tmp_path / "elsewhere/b.png")
    (tmp_path / "in/linked.txt").write_text("also")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "in/gone.txt").write_text("gone")
    (tmp_path / "in/folder.png").mkdir()
    report = packed(tmp_path / "in", tmp_path / "out")
    assert sources(tmp_path / "out") == ["b.png", "c.png", "linked.png", "a.png"]
    assert report.failed == {"image": 1}


def test_a_folder_that_cannot_be_read_counts(tmp_path, monkeypatch):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/locked/b.png")
    real = os.scandir

    def locked(path):  # whoever runs the tests may read all
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    rows = rows_of(tmp_path / "in")
    assert (rows.count, rows.passed_by()) == (1, {"folders that cannot be read": 1})


def test_a_named_pipe_is_not_waited_for(tmp_path):
    picture(tmp_path / "in/a.png")
    os.mkfifo(tmp_path / "in/b.png")
    (tmp_path / "in/b.txt").write_text("b")
    assert packed(tmp_path / "in", tmp_path / "out").failed == {"image": 1}


def test_names_of_files_that_are_not_utf8(tmp_path, capsys):
    odd = "größer".encode("latin-1")
    for name in (odd, b"broken-" + odd):
        path = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name + b".png"))
        picture(path, "größer")
    path.write_bytes(b"no picture")
    run([str(tmp_path / "in"), str(tmp_path / "out")])
    (sample,) = read(tmp_path / "out")
    (stats,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*_stats.json"))
    assert {json.loads(sample["json"])["source"], Path(stats["failed"][0]["path"]).name} == {
        "gr??er.png",
        "broken-gr??er.png",
    }
    assert pq.read_table(tmp_path / "out/00000.parquet")["source"].to_pylist() == [
        "broken-gr??er.png",
        "gr??er.png",
    ]
    (tmp_path / "in/t.csv").write_bytes(b"path,caption\n" + odd + b".png,from a table\n")
    run([str(tmp_path / "in/t.csv"), str(tmp_path / "table")])
    (sample,) = read(tmp_path / "table")
    assert sample["txt"] == b"from a table"


def test_rows_without_a_path_or_a_caption_are_left_out_by_name(tmp_path, capsys):
    picture(tmp_path / "a.png", None)
    rows = [
        ("a.png", "good"),
        ("a.png", None),
        (None, "no path"),
        ("a.png", " "),
        ("a\0.png", "b"),
        ("b.png", "gone"),
    ]
    table = pa.table({"path": [row[0] for row in rows], "caption": [row[1] for row in rows]})
    pq.write_table(table, tmp_path / "t.parquet")
    run([str(tmp_path / "t.parquet"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "1 of 6 pictures packed in 1 shard" in said
    assert "Left out, caption: 2 " in said
    assert "Left out, image: 2 " in said
    assert "Left out, path: 1 " in said
    errors = pq.read_table(tmp_path / "out/00000.parquet")["error_message"].to_pylist()
    assert errors[1:4] == ["caption: it is empty", "path: there is none", "caption: it is empty"]


def test_rows_that_cannot_be_read_are_said(tmp_path, capsys):
    picture(tmp_path / "a.png", None)
    (tmp_path / "t.csv").write_bytes(b"path,caption\na.png,good\na.png\na.png,\xff\n")
    run([str(tmp_path / "t.csv"), str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "1 of 2 pictures packed in 1 shard" in said
    assert ", rows with another number of columns: 1" in said
    assert ", values that are not UTF-8: 1" in said
    assert "Left out, caption: 1 " in said


def test_columns_are_found_in_any_case_and_a_mark_is_no_part_of_a_caption(tmp_path):
    picture(tmp_path / "a.png", None).with_suffix(".txt").write_text("\ufeffa caption\n", "utf-8")
    (tmp_path / "t.tsv").write_text("PATH\tCaption\na.png\tfrom a table\n", "utf-8-sig")
    packed(tmp_path / "t.tsv", tmp_path / "table")
    packed(tmp_path, tmp_path / "folder")
    assert [read(tmp_path / name)[0]["txt"] for name in ("table", "folder")] == [
        b"from a table",
        b"a caption",
    ]


def test_captions_from_a_system_where_case_does_not_count(tmp_path):
    picture(tmp_path / "in/IMG.JPG", None)
    (tmp_path / "in/IMG.TXT").write_text("in capitals")
    rows = rows_of(tmp_path / "in")
    assert not rows.passed_by()
    packed(tmp_path / "in", tmp_path / "out")
    assert [sample["txt"] for sample in read(tmp_path / "out")] == [b"in capitals"]


def test_a_table_is_not_kept_in_memory(tmp_path):
    """40,000 captions of 1 kB."""
    with pq.ParquetWriter(
        tmp_path / "t.parquet", pa.schema([("path", pa.string()), ("caption", pa.string())])
    ) as to:
        for i in range(40):
            to.write_table(
                pa.table(
                    {"path": ["gone.png"] * 1000, "caption": [f"{i} {j}" + "x" * 1000 for j in range(1000)]}
                )
            )
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    report = pack(rows_of(tmp_path / "t.parquet"), tmp_path / "out", 1000, lambda done: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.failed == {"image": 40_000}
    assert peak < 12 << 20
    assert pa.total_allocated_bytes() - before < 10 << 20


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A picture with an alpha channel, one that lies on its side, one in another colour space, and plain ones."""
    folder = tmp_path / "in"
    picture(folder / "a.jpg")
    picture(folder / "b.webp", lossless=True)
    clear = Image.new("RGBA", (8, 6), (200, 0, 0, 128))
    clear.save(folder / "c.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "d.jpg", exif=exif)
    Image.new("CMYK", (8, 6), (0, 200, 100, 10)).save(folder / "e.tif")
    for name in "ce":
        (folder / f"{name}.txt").write_text(name)
    return folder


@pytest.mark.parametrize("extension", ["png", "webp", "jpg"])
def test_all_pictures_of_one_format(mixed, tmp_path, extension):
    from t2i.data.decode import decode_image

    report = packed(mixed, tmp_path / "out", extension=extension)
    assert report.formats == {extension: 5}
    for sample, path in zip(
        read(tmp_path / "out"), sorted(path for path in mixed.iterdir() if path.suffix != ".txt"), strict=True
    ):
        assert set(sample) == {"__key__", "__url__", "__local_path__", "txt", "json", extension}
        wanted, (height, width) = decode_image(path.read_bytes(), "")
        made, _ = decode_image(sample[extension], "")
        if extension == "jpg":
            assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted)).mean() < 4
        else:
            assert made.tobytes() == wanted.tobytes()  # without loss, as training would see it
        told = json.loads(sample["json"])
        sizes = [told[name] for name in ("width", "height", "original_width", "original_height")]
        assert sizes == [width, height, width, height]
        assert told["sha256"] == hashlib.sha256(sample[extension]).hexdigest()
        if path.suffix == f".{extension}":
            assert sample[extension] == path.read_bytes()  # not encoded again
        else:
            assert Image.open(io.BytesIO(sample[extension])).mode == "RGB"


def test_mixed_formats_are_said_and_another_call_goes_on_with_the_same_format_only(mixed, tmp_path, capsys):
    from t2i.errors import DataError

    run([str(mixed), str(tmp_path / "mixed")])
    words = "The formats are mixed (2 jpg, 2 png, 1 webp): t2i and webdataset read all; HF datasets refuses"
    assert words in capsys.readouterr().out
    run([str(mixed), str(tmp_path / "mixed")])
    assert words in capsys.readouterr().out  # of what is there, too
    run([str(mixed), str(tmp_path / "png"), "--format", "png"])
    assert "formats are mixed" not in capsys.readouterr().out
    with pytest.raises(DataError, match="was not packed from these rows with these options"):
        run([str(mixed), str(tmp_path / "png")])


def test_captions_that_are_no_files_are_not_read(tmp_path):
    """A link to /dev/zero never ends, and a named pipe waits for whoever writes to it."""
    for name in ("good", "zeros", "pipe", "folder", "gone"):
        picture(tmp_path / f"in/{name}.png", "a" if name == "good" else None)
    (tmp_path / "in/zeros.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "in/pipe.txt")
    (tmp_path / "in/folder.txt").mkdir()
    report = pack(rows_of(tmp_path / "in"), tmp_path / "out", 10, lambda _: None)
    assert (report.packed, report.failed) == (1, {"caption": 4})
