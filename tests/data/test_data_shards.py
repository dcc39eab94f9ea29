"""The shards of a dataset: where their sizes come from, and what their samples are called."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import tarfile
import time

import numpy as np
import pyarrow as pa
import pytest
from data_configs import data_config
from data_samples import encode, good_members, noise
from open_shards import everything, opened, take
from servers import web_server

from t2i.data.index import SUFFIX, ShardIndex
from t2i.data.scans import scans_folder
from t2i_pipelines import indexing
from t2i_pipelines.places import places
from t2i_pipelines.selection import write_selection


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    with web_server(tmp_path) as served:
        yield served


def index(paths, out=None):
    """What `t2i data index` does, in this process."""
    sizes = {}
    for path in paths:
        place = places([str(path)], SUFFIX, out)[str(path)]
        sizes[path.name] = indexing._index_one(str(path), place).entry
    folder = out or paths[0].parent
    (folder / "index.json").write_text(json.dumps({"version": 1, "shards": sizes}))


@pytest.fixture
def scans(monkeypatch):
    """What is scanned from now on."""
    scanned = []
    scan = ShardIndex.scan.__func__
    monkeypatch.setattr(
        ShardIndex,
        "scan",
        classmethod(lambda cls, path, *of: scanned.append(str(path)) or scan(cls, path, *of)),
    )
    return scanned


def test_sizes_come_from_a_scan_from_the_index_of_each_shard_or_from_that_of_all(shard, scans):
    paths = [shard(0, 3), shard(1, 5)]
    assert opened(paths).sizes.tolist() == [3, 5]
    assert scans == list(map(str, paths))
    index(paths)
    scans.clear()
    assert opened(paths).sizes.tolist() == [3, 5]
    assert everything(opened(paths)) == (
        [f"{s:05d}{i:04d}" for s, n in ((0, 3), (1, 5)) for i in range(n)],
        {},
    )
    (paths[0].parent / "index.json").unlink()
    assert opened(paths).sizes.tolist() == [3, 5]
    assert scans == []


def settled(path):
    """`path`, written to an hour ago."""
    hour = time.time() - 3600
    os.utime(path, (hour, hour))
    return path


def test_a_scan_is_kept_for_the_next_start(shard, scans, caplog):
    caplog.set_level(logging.INFO)
    paths = [settled(shard(0, 3)), settled(shard(1, 5))]
    first = everything(opened(paths))
    assert scans == list(map(str, paths))
    assert sum("scanning shards" in message for message in caplog.messages) == 1
    scans.clear()
    caplog.clear()
    assert everything(opened(paths)) == first
    assert (scans, caplog.messages) == ([], [])


def test_a_kept_scan_knows_the_sizes_of_source_pictures(shard, monkeypatch):
    path = settled(shard(0, 3))
    (sizes,) = opened([path]).original_px()
    monkeypatch.setattr(ShardIndex, "with_sizes", None)
    (again,) = opened([path]).original_px()
    np.testing.assert_array_equal(again, sizes)


def test_a_shard_that_changed_is_scanned_again(shard, scans):
    assert opened([settled(shard(0, 3))]).sizes.tolist() == [3]
    assert opened([settled(shard(0, 4))]).sizes.tolist() == [4]
    path = settled(shard(0, 4))
    content = bytearray(path.read_bytes())
    content[content.index(b"000000002")] = ord("9")  # the same size
    path.write_bytes(content)
    os.utime(path, (time.time() - 1800,) * 2)
    scans.clear()
    everything(opened([path]))
    assert scans == [str(path)]


def test_what_was_written_a_moment_ago_is_not_kept(shard, scans):
    path = shard(0, 3)
    for _ in range(2):
        opened([path])
    assert scans == [str(path)] * 2


def test_a_kept_scan_that_is_damaged_or_cannot_be_written_is_done_without(shard, scans):
    path = settled(shard(0, 3))
    opened([path])
    (kept,) = scans_folder().iterdir()
    kept.write_bytes(b"PK" + kept.read_bytes()[2:100])
    assert opened([path]).sizes.tolist() == [3]
    assert scans == [str(path)] * 2
    shutil.rmtree(scans_folder())
    scans_folder().write_text("a file where the folder would be")
    assert opened([path]).sizes.tolist() == [3]


def test_without_a_cache_every_start_scans(shard, scans, monkeypatch):
    monkeypatch.setattr(
        "t2i.data.scans.user_cache", lambda: (_ for _ in ()).throw(FileNotFoundError("no home"))
    )
    path = settled(shard(0, 3))
    for _ in range(2):
        assert opened([path]).sizes.tolist() == [3]
    assert scans == [str(path)] * 2


def test_kept_scans_that_nobody_used_for_long_are_removed(shard, scans):
    opened([settled(shard(0, 3))])
    (old,) = scans_folder().iterdir()
    os.utime(old, (0, 0))
    opened([settled(shard(1, 5))])
    assert not old.exists()
    assert len(list(scans_folder().iterdir())) == 1


def test_what_index_shards_writes_is_what_is_read(shard, scans, tmp_path):
    paths = [shard(0, 3), shard(1, 5)]
    indexing.index_shards([str(path) for path in paths], None, 1, lambda _: None)
    scans.clear()
    shards = opened(paths)
    assert shards.sizes.tolist() == [3, 5]
    assert len(everything(shards)[0]) == 8
    assert scans == []


def test_of_remote_shards_statistics_do_and_else_they_are_copied_and_scanned(shard, server, tmp_path):
    url, handler = server
    for number in range(3):
        shard(number, 4)
    (tmp_path / "00000_stats.json").write_text('{"count": 9, "successes": 4}')
    (tmp_path / "00001_stats.json").write_text('{"successes": "four"}')
    shards = opened([f"{url}/{number:05d}.tar?token=a/b" for number in range(3)])
    assert shards.sizes.tolist() == [4, 4, 4]
    assert [asked for asked in handler.asked if asked.endswith(".tar")].count("GET /00000.tar") == 0
    assert len(everything(shards)[0]) == 12
    for number in range(3):
        assert handler.asked.count(f"GET /{number:05d}.tar") == 1


def test_statistics_that_promise_more_or_less_than_there_is(shard, server, tmp_path, caplog):
    url, _ = server
    shard(0, 3), shard(1, 5)
    (tmp_path / "00000_stats.json").write_text('{"successes": 5}')
    (tmp_path / "00001_stats.json").write_text('{"successes": 4}')
    shards = opened([f"{url}/{number:05d}.tar" for number in range(2)])
    assert shards.sizes.tolist() == [5, 4]
    keys, bad = everything(shards)
    assert len(keys) == 7
    assert bad == {"missing": 2}
    assert "holds 1 sample more than it is listed with" in caplog.text


@pytest.mark.parametrize("now", [1, 12])
@pytest.mark.parametrize("with_all", [True, False])
def test_a_shard_replaced_after_it_was_indexed_is_noticed(shard, now, with_all, caplog):
    path = shard(0, 4)
    index([path])
    if not with_all:
        (path.parent / "index.json").unlink()
    before = path.stat().st_size
    shard(0, now)
    assert path.stat().st_size != before
    keys, bad = everything(opened([path]))
    assert keys == [f"00000{i:04d}" for i in range(now)]
    assert bad == {}
    assert "`t2i data index` again" in caplog.text


def test_a_shard_replaced_by_one_of_the_same_size_in_bytes_is_noticed(write_tar, caplog):
    """tarfile fills archives up to whole records of 10 KiB, so that one sample more need not show."""
    text = {f"{i}": {"txt": b"x"} for i in range(5)}
    path = write_tar("00000.tar", text)
    index([path])
    before = path.stat().st_size
    write_tar("00000.tar", {"a" + key: members for key, members in text.items()} | {"b": {"txt": b"y"}})
    assert path.stat().st_size == before
    keys, bad = everything(opened([path]))
    assert keys == ["a0", "a1", "a2", "a3", "a4"]  # as many as index.json lists
    assert bad == {}
    assert "`t2i data index` again" in caplog.text
    assert "1 sample more than it is listed with" in caplog.text


def test_a_sample_that_is_not_where_its_index_says_is_not_taken_for_another(write_tar, tmp_path):
    path = write_tar("00000.tar", {f"{i}": {"txt": f"{i}".encode()} for i in range(5)})
    index([path])
    content = bytearray(path.read_bytes())
    content[2 * 1024 : 3 * 1024], content[1 * 1024 : 2 * 1024] = content[1024:2048], content[2048:3072]
    path.write_bytes(content)  # samples 1 and 2 have changed places
    keys, bad = everything(opened([path]))
    assert keys == ["0", "3", "4"]
    assert bad == {"unreadable": 2}


def test_keep_leaves_out_what_is_known_and_not_wanted_and_loses_no_count(shard, write_tar, tmp_path):
    samples = {f"00000{i:04d}": good_members(i, 10 + i) for i in range(5)}
    samples["000000005"] = {"png": encode(noise(0, 9, 9))[:10], "txt": b"a size that is not known"}
    path = write_tar("00000.tar", samples)
    with tarfile.open(path) as archive:
        cut = archive.getmember("000000004.txt").offset_data
    path.write_bytes(path.read_bytes()[:cut])
    (tmp_path / "00000_stats.json").write_text('{"successes": 8}')
    shards = opened([path, tmp_path / "99999.tar"], max_bad_share=1.0)
    assert shards.sizes.tolist() == [8, 1]
    before = everything(shards)[1]
    assert shards.keep(120) == 130  # the last is cut off
    keys, bad = everything(shards)
    assert bad == before
    assert bad["missing"] >= 1
    assert bad.total() + len(keys) == shards.sizes.sum() == 9 - 2
    again = everything(opened([path, tmp_path / "99999.tar"], max_bad_share=1.0))[0]
    assert set(again) - set(keys) == {"000000000", "000000001"}


def test_sizes_stay_with_their_samples_where_a_shard_has_more_or_fewer_than_listed(shard, write_tar):
    """Buckets are assigned by them."""
    paths = [
        write_tar(f"{n:05d}.tar", {f"{i}": good_members(i, 10, 10 + n) for i in range(4)}) for n in range(3)
    ]
    index(paths)
    write_tar("00000.tar", {f"{i}": good_members(i, 10, 10) for i in range(2)})
    write_tar("00002.tar", {f"{i}": good_members(i, 10, 12) for i in range(9)})
    entry = json.loads((paths[0].parent / "index.json").read_text())
    for path in paths:
        entry["shards"][path.name]["bytes"] = path.stat().st_size
    (paths[0].parent / "index.json").write_text(json.dumps(entry))
    shards = opened(paths)
    assert shards.sizes.tolist() == [4, 4, 4]
    sizes = np.concatenate(list(shards.original_px()))
    assert sizes[:, 1].tolist() == [100] * 2 + [0] * 2 + [110] * 4 + [120] * 4


def test_a_shard_that_shrinks_after_samples_were_left_out_does_not_crash(write_tar):
    samples = {f"00000{i:04d}": good_members(i, 10 + i % 2) for i in range(9)}
    path = write_tar("00000.tar", samples)
    shards = opened([path])
    shards.keep(110)
    assert shards.sizes.tolist() == [4]
    write_tar("00000.tar", dict(list(samples.items())[:3]))
    keys, bad = everything(pickle.loads(pickle.dumps(shards)))  # as another process gets them
    assert keys == ["000000001"]
    assert bad == {"missing": 3}


def test_selections_name_samples_and_what_is_not_there_counts(shard, tmp_path):
    paths = [shard(0, 4), shard(1, 4)]
    chosen = [["000000003", "000000001", "nobody"], ["000010002"]]
    count = write_selection(tmp_path / "some" / "kept.arrow", list(map(str, paths)), map(pa.array, chosen))
    assert count == 4
    shards = opened([tmp_path / "some" / "kept.arrow"])
    assert shards.sizes.tolist() == [3, 1]
    keys, bad = everything(shards)
    assert keys == ["000000003", "000000001", "000010002"]
    assert bad == {"missing": 1}
    (lost,) = shards.read([(0, 2)])
    assert (lost.cause, lost.key) == ("missing", "nobody")
    data = data_config(shards=str(tmp_path / "some" / "kept.arrow"), max_bad_share=1.0)
    (batch,) = take(data, 1, batch_size=4)
    assert set(batch.key) == {"000000003", "000000001", "000010002"}
    assert batch.bad == {"missing": 1}


def test_a_selection_of_shards_on_a_server(shard, server, tmp_path):
    url, _ = server
    shard(0, 4)
    write_selection(tmp_path / "kept.arrow", [f"{url}/00000.tar"], [pa.array(["000000002"])])
    assert everything(opened([tmp_path / "kept.arrow"])) == (["000000002"], {})


def test_keys_are_unique_and_img2datasets_are_kept(shard, write_tar):
    assert everything(opened([shard(0, 2), shard(1, 2)]))[0] == [
        "000000000",
        "000000001",
        "000010000",
        "000010001",
    ]
    alike = [
        write_tar(name, {"a": good_members(0), "b": good_members(1)})
        for name in ("x.tar", "y.tar", "long.tar")
    ]
    assert everything(opened(alike[:1]))[0] == ["a", "b"]
    assert everything(opened(alike[:2]))[0] == ["x:a", "x:b", "y:a", "y:b"]
    assert len(set(everything(opened(alike))[0])) == 6
    assert len(set(everything(opened([*alike, alike[0]]))[0])) == 8
