"""A selection is a plain Arrow file, names local shards from its own folder, and can be moved with them."""

from __future__ import annotations

import io
import tarfile
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.data.selection import listed
from t2i.errors import DataError
from t2i_pipelines import selection as module
from t2i_pipelines.filtering.repack import repack
from t2i_pipelines.selection import listed_once, spans, write_selection


def keys(*names: str):
    return pa.array(names, pa.string())


def table(path: Path):
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def test_the_format(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 3)
    out = tmp_path / "lists" / "kept.arrow"
    shards = [str(tmp_path / "data/00000.tar"), "https://host/00001.tar", "pipe:cat x.tar", "s3://b/2.tar"]
    assert write_selection(out, shards, [keys("b", "a"), keys(), keys("c", "d", "e"), keys("a")]) == 6
    found = table(out)
    assert found.schema == pa.schema(
        [("shard", pa.dictionary(pa.int32(), pa.string())), ("key", pa.string())]
    )
    assert found["shard"].to_pylist() == ["../data/00000.tar"] * 2 + ["pipe:cat x.tar"] * 3 + ["s3://b/2.tar"]
    assert found["key"].to_pylist() == ["b", "a", "c", "d", "e", "a"]
    assert found["shard"].num_chunks == 2
    first, second = (chunk.dictionary for chunk in found["shard"].chunks)
    assert first.equals(second)
    assert [path.name for path in out.parent.iterdir()] == ["kept.arrow"]


def test_it_is_mapped_and_not_compressed(tmp_path):
    out = tmp_path / "kept.arrow"
    write_selection(out, ["a.tar"], [keys(*(f"{i:09d}" for i in range(50_000)))])
    before = pa.total_allocated_bytes()
    with pa.memory_map(str(out)) as file:
        found = pa.ipc.open_file(file).read_all()
        assert len(found) == 50_000
        assert pa.total_allocated_bytes() - before < 1000


@given(st.lists(st.lists(st.text(min_size=1), max_size=5), max_size=6), st.integers(1, 7))
def test_what_is_written_is_read(tmp_path_factory, parts, samples):
    out = tmp_path_factory.mktemp("selection") / "kept.arrow"
    shards = [f"s3://bucket/{i:05d}.tar" for i in range(len(parts))]
    count = write_selection(out, shards, [keys(*part) for part in parts])
    assert count == sum(map(len, parts))
    assert out.exists() == (count > 0)
    if count:
        found = listed([str(out)])
        assert [(each.url, each.keys.to_pylist()) for each in found] == [
            (shard, part) for shard, part in zip(shards, parts, strict=True) if part
        ]
        runs = [
            [key for each, start, stop in run for key in each.keys[start:stop].to_pylist()]
            for run in spans(found, samples)
        ]
        assert [len(run) for run in runs[:-1]] == [samples] * (len(runs) - 1)
        assert 1 <= len(runs[-1]) <= samples
        assert list(chain(*runs)) == list(chain(*parts))


def test_shards_and_selection_can_be_moved_together(tmp_path, monkeypatch):
    (tmp_path / "here/data").mkdir(parents=True)
    (tmp_path / "here/data/0.tar").touch()
    monkeypatch.chdir(tmp_path)
    write_selection(Path("here/lists/kept.arrow"), ["here/data/0.tar"], [keys("a")])
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir("/")
    (found,) = listed([str(tmp_path / "there/lists/kept.arrow")])
    assert Path(found.url).resolve() == tmp_path / "there/data/0.tar"


def test_a_shard_comes_once(tmp_path):
    write_selection(tmp_path / "kept.arrow", [str(tmp_path / "0.tar")], [keys("a")])
    with pytest.raises(DataError, match="is named twice; allowed: once"):
        listed_once([str(tmp_path / "kept.arrow"), str(tmp_path / "0.tar")])


def shard(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            for extension, content in (
                ("jpg", name.encode() * 3),
                ("json", b'{"caption": "%s"}' % name.encode()),
            ):
                info = tarfile.TarInfo(f"{name}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_repacked(tmp_path):
    """Two shards with the same keys become shards of three; bytes are the same, keys are unique and traced."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    names = [f"{i:09d}" for i in range(4)]
    shard(tmp_path / "x/00000.tar", names)
    shard(tmp_path / "y/00000.tar", names)
    kept = tmp_path / "kept.arrow"
    wanted = [keys(names[3], names[1]), keys(names[0], "absent", names[2])]
    write_selection(kept, [str(tmp_path / "x/00000.tar"), str(tmp_path / "y/00000.tar")], wanted)
    done: list[int] = []
    report = repack(kept, tmp_path / "out", 3, done.append)
    assert (report.packed, report.shards, report.skipped, dict(report.failed)) == (4, 2, 0, {"missing": 1})
    assert done == [3, 2]
    first, second = members(tmp_path / "out/00000.tar"), members(tmp_path / "out/00001.tar")
    assert set(first) == {f"00000000{i}.{e}" for i in range(3) for e in ("jpg", "json")}
    assert first["000000000.jpg"] == names[3].encode() * 3
    assert second == {"000010001.jpg": names[2].encode() * 3, "000010001.json": b'{"caption": "000000002"}'}
    rows = parquet.read_table(tmp_path / "out/00000.parquet").to_pylist()
    assert [(row["key"], row["source_key"], row["caption"]) for row in rows] == [
        ("000000000", names[3], names[3]),
        ("000000001", names[1], names[1]),
        ("000000002", names[0], names[0]),
    ]
    assert [Path(row["source_shard"]).parent.name for row in rows] == ["x", "x", "y"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out/00001.tar").unlink()  # as if it had been stopped
    assert repack(kept, tmp_path / "out", 3, done.append).skipped == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    write_selection(
        kept, [str(tmp_path / "x/00000.tar"), str(tmp_path / "y/00000.tar")], [wanted[0], wanted[1][:1]]
    )
    with pytest.raises(DataError, match=r"00001\.tar is not of these samples, which fill 1 shard;"):
        repack(kept, tmp_path / "out", 3, done.append)
    write_selection(kept, [str(tmp_path / "x/00000.tar"), str(tmp_path / "y/00000.tar")], wanted)
    with pytest.raises(DataError, match="holds another selection's samples"):
        repack(kept, tmp_path / "out", 2, done.append)


def test_a_selection_that_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"none\.arrow does not exist\.$"):
        listed([str(tmp_path / "none.arrow")])
