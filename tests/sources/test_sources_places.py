"""What jobs make of shards lies beside them or in the folder that was named, nowhere else, and nothing twice."""

from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from t2i.data.encoded import shard_name
from t2i.data.index import ShardIndex
from t2i.errors import ConfigError, DataError
from t2i_pipelines.indexing import index_shards
from t2i_pipelines.places import places
from t2i_pipelines.shard_writer import png_sample, write_shards

URLS = [
    "../00000.tar",
    "../../../../../../../../../../00000.tar",
    "a/../../00000.tar",
    "a/b/../../../..",
    "..",
    ".",
    "/..",
    "../..tar",
    "file:///../00000.tar",
    "file:../00000.tar",
    "https://host/../00000.tar",
    "https://host/a/../../../00000.tar?x=../../y",
    "s3://bucket/../00000.tar",
    "s3://..",
    "pipe:cat ../00000.tar",
]


def shard(path: Path, samples: int = 1) -> Path:
    picture = Image.new("RGB", (8, 6), "red")
    (made,) = write_shards([png_sample(picture, "red", {})] * samples, path.parent / f".{path.name}")
    return made.rename(path)


@pytest.mark.parametrize("url", URLS)
def test_nothing_is_written_outside_the_folder(tmp_path, monkeypatch, url):
    (tmp_path / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/er")
    out = tmp_path / "out"
    for made in (out / shard_name(url), places([url], ".scores.parquet", out)[url]):
        assert ".." not in made.relative_to(out).parts
        assert out in made.resolve().parents


def test_an_encoded_shard_is_named_by_the_true_folder_of_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    assert shard_name("../00000.tar") == shard_name(f"{tmp_path}/00000.tar") == f"{tmp_path.name}/00000.tar"
    assert shard_name("a/b/../00000.tar") == shard_name("a/00000.tar") == "a/00000.tar"
    assert shard_name("00000.tar") == "shards/00000.tar"


def test_names_that_are_one_on_macos_or_windows_are_two_nowhere(tmp_path):
    accent = unicodedata.normalize("NFD", "é")
    for one, other in (("a/Cats.tar", "b/cats.tar"), ("a/é.tar", f"b/{accent}.tar"), ("a/0.tar", "b/0.tar")):
        with pytest.raises(ConfigError, match=rf"{one} and {other} would both have .*/out/.*\.npz; name one"):
            places([one, other], ".index.npz", tmp_path / "out")
        assert len(places([one, other], ".index.npz", None)) == 2  # beside shards that are two
    with pytest.raises(ConfigError, match="would both have"):
        places(["a/0.tar", "./a/0.tar"], ".index.npz", None)


def test_what_a_signed_address_says_is_no_part_of_a_name(tmp_path):
    url = "https://host/00000.tar?signature=a/b"
    assert places([url], ".index.npz", tmp_path)[url] == tmp_path / "00000.index.npz"


def test_a_shard_named_twice_is_indexed_once(tmp_path, capsys):
    from t2i_cli.data.index import run

    path = str(shard(tmp_path / "0.tar", 2))
    run([path, path, "--processes", "1"])
    assert "Indexed 2 samples in 1 shard" in capsys.readouterr().out


def test_a_shard_named_twice_is_refused_however_it_is_spelt(tmp_path, monkeypatch):
    """Else every sample of it would be a duplicate of itself, and both would go."""
    from t2i_pipelines.selection import listed_once

    shard(tmp_path / "0.tar")
    shard(tmp_path / "1.tar")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for other in ("0.tar", "./0.tar", f"{tmp_path}/0.tar", f"file://{tmp_path}/0.tar", "link/0.tar"):
        with pytest.raises(DataError, match=r"0\.tar is named twice; allowed: once"):
            listed_once(["0.tar", "1.tar", other])
    assert len(listed_once(["0.tar", "1.tar"])) == 2


def test_an_index_that_cannot_be_written_is_not_the_shards_fault(tmp_path):
    paths = [shard(tmp_path / f"{i}.tar") for i in range(2)]
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        index_shards([str(path) for path in paths], tmp_path / "file/deep", 1, lambda _: None)
    (tmp_path / "1.index.npz").mkdir()  # in the way of the second
    with pytest.raises(IsADirectoryError, match=r"1\.index\.npz"):
        index_shards([str(path) for path in paths], None, 1, lambda _: None)
    assert not list(tmp_path.glob(".*.unfinished"))
    assert len(ShardIndex.from_bytes((tmp_path / "0.index.npz").read_bytes(), "")) == 1
    (tmp_path / "1.index.npz").rmdir()
    report = index_shards([str(path) for path in paths], None, 1, lambda _: None)
    assert (report.shards, report.skipped, report.unreadable) == (1, 1, {})


def test_folders_whose_names_are_not_utf8(tmp_path, capsys):
    """As on a disk that was written under another encoding."""
    from t2i_cli.data.dedup import run as dedup
    from t2i_cli.data.filter import run as filter_
    from t2i_cli.data.index import run as index
    from t2i_cli.data.inspect import run as inspect
    from t2i_cli.data.pack import run as pack

    sys.stdout.reconfigure(errors="backslashreplace")  # as t2i_cli.console has it in a process of its own
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xf6sse"))
    odd.mkdir()
    Image.new("RGB", (8, 6), "red").save(odd / "a.png")
    (odd / "table.csv").write_text("path,caption\na.png,red\n")
    pack([str(odd / "table.csv"), str(odd / "shards")])
    index([str(odd / "shards/00000.tar"), "--processes", "1"])
    inspect([str(odd / "shards/00000.tar"), "--json", str(odd / "facts.json")])
    for job in (filter_, dedup):  # a selection holds the names of shards as text
        with pytest.raises(DataError, match="is not named in UTF-8; allowed: names in UTF-8"):
            job([str(odd / "shards/00000.tar"), str(tmp_path / "kept.arrow")])
    plain = str(shard(tmp_path / "0.tar"))
    filter_([plain, str(odd / "kept.arrow"), "--min-shorter-side-px", "1"])
    dedup([plain, str(odd / "unique.arrow"), "--workers", "1"])
    filter_([str(odd / "table.csv"), str(odd / "kept.parquet"), "--where", "caption = 'red'"])
    assert {path.name for path in odd.iterdir()} >= {
        "facts.json",
        "kept.arrow",
        "unique.arrow",
        "kept.parquet",
    }
