"""What `t2i data index` writes of a whole folder: a start over it opens no shard, and chooses the same samples."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_configs import data_config
from data_samples import good_members
from open_shards import everything, opened, take
from servers import web_server

from t2i.data import index as index_module
from t2i.data.buckets import assign, bucket_shapes
from t2i.data.decode import BadSample
from t2i.data.folder_index import as_stored
from t2i.data.shards import Shards
from t2i_pipelines import indexing

CHOSEN = {"min_original_px": 120, "size_px": (8, 8)}
BUCKETS = {"bucket_step_px": 2, "max_aspect": 4.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # In this process: to start others takes seconds.
    monkeypatch.setattr(indexing, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))


@pytest.fixture
def folder(tmp_path):
    """Shards of pictures of many sizes: one with a name that comes twice, one that is empty, one that img2dataset
    counted more samples in, one with a picture larger than two bytes can say."""
    (tmp_path / "shards").mkdir()
    for number, count in enumerate((7, 5, 0, 6, 8)):
        with tarfile.open(tmp_path / "shards" / f"{number:05d}.tar", "w") as archive:
            for i in [*range(count), *([4] if number == 1 else [])]:
                members = good_members(10 * number + i, 9 + (number + i) % 5, 16 - 2 * (i % 5))
                if (number, i) == (3, 4):
                    members["json"] = b'{"original_width": 70000, "original_height": 40000}'
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{number:05d}{i:04d}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    (tmp_path / "shards" / "00003_stats.json").write_text('{"successes": 8}')
    long_ago(tmp_path / "shards")
    return tmp_path / "shards"


def long_ago(folder):
    """As if all files had been written an hour ago."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def tars(folder):
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def index(folder, shards=None, processes=1):
    return indexing.index_shards(shards or tars(folder), None, processes, lambda _: None)


def content(shards, **options):
    """All batches of an epoch and more, as far as the order and the choice of samples shows."""
    data = data_config(shards=shards, max_bad_share=1.0, shuffle_window_shards=3, **BUCKETS)
    return [(batch.key, batch.bad, tuple(batch.image.shape)) for batch in take(data, 12, **CHOSEN, **options)]


def test_a_start_chooses_the_same_samples_in_the_same_order_with_and_without_it(folder):
    wanted = content(tars(folder))
    assert len({shape for _, _, shape in wanted}) > 1
    index(folder)
    assert content(tars(folder)) == wanted
    assert (
        content(tars(folder)[::-1]) != wanted
    )  # another order of shards is another order, read piece by piece
    (next(folder.glob("index.*.sizes"))).unlink()
    assert content(tars(folder)) == wanted
    (folder / "index.json").unlink()
    assert content(tars(folder)) == wanted


def test_the_order_of_the_shards_does_not_matter_to_it(folder):
    backwards = tars(folder)[::-1]
    wanted = content(backwards)
    index(folder)
    assert content(backwards) == wanted


def test_a_start_opens_no_shard(folder, monkeypatch):
    index(folder)
    shards = tars(folder)
    monkeypatch.setattr(Shards, "_opened", None)
    monkeypatch.setattr("t2i.data.shards.index_beside", None)
    found = opened(shards)
    found.keep(120)
    sizes = np.concatenate(list(found.original_px()))
    assert len(sizes) == found.sizes.sum() > 0
    assert sizes.dtype == np.uint16


def test_a_start_opens_no_compressed_shard_either(folder, monkeypatch):
    wanted = np.concatenate(list(opened(tars(folder)).original_px()))
    for path in map(Path, tars(folder)):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    shards = [str(path) for path in sorted(folder.glob("*.tar.gz"))]
    index(folder, shards)
    monkeypatch.setattr(Shards, "_opened", None)
    monkeypatch.setattr("t2i.data.shards.open_indexed", None)
    np.testing.assert_array_equal(np.concatenate(list(opened(shards).original_px())), wanted)


def test_of_a_server_only_the_folders_index_is_read_before_the_first_batch(folder):
    index(folder)
    wanted = content(tars(folder))
    with web_server(folder) as (url, handler):
        shards = [f"{url}/{number:05d}.tar" for number in range(5)]
        found = opened(shards)
        assert found.keep(120) == 37448
        list(found.original_px())
        assert {asked.split()[1].rpartition(".")[2] for asked in handler.asked} == {"json", "sizes"}
        again = opened(shards)
        again.keep(120)  # a copy of it is kept
        assert sum(asked.startswith("GET") and asked.endswith(".sizes") for asked in handler.asked) == 1
        assert content(shards) == wanted
        read = data_of(shards, 1)
        assert len(read) < 5
        handler.asked.clear()


def data_of(shards, batches):
    """The shards of which the first batches are."""
    data = data_config(shards=shards, shuffle_window_shards=2)
    return {key[:5] for batch in take(data, batches, **CHOSEN) for key in batch.key}


def test_remote_shards_without_it_are_chosen_by_their_own_indexes(folder):
    index(folder)
    wanted = content(tars(folder))
    (folder / "index.json").unlink()
    with web_server(folder) as (url, handler):
        shards = [f"{url}/{number:05d}.tar" for number in range(5)]
        found = opened(shards)
        found.keep(120)
        list(found.original_px())
        assert not [asked for asked in handler.asked if asked.endswith(".tar")]
        assert content(shards) == wanted


@pytest.mark.parametrize("damage", ["short", "gone", "named badly", "first", "flawed"])
def test_where_it_is_damaged_the_shards_are_asked(folder, damage, caplog):
    wanted = content(tars(folder))
    index(folder)
    place = folder / "index.json"
    values = json.loads(place.read_text())
    sizes = folder / f"index.{values['sizes']}.sizes"
    if damage == "short":
        sizes.write_bytes(sizes.read_bytes()[:-1])
    if damage == "gone":
        sizes.unlink()
    if damage == "named badly":
        values["sizes"] = "../../etc/passwd"
    if damage == "first":
        values["shards"]["00001.tar"]["first"] = 2**62
    if damage == "flawed":
        values["shards"]["00001.tar"]["flawed"] = [5, 99, -3]
    place.write_text(json.dumps(values))
    assert content(tars(folder)) == wanted
    if damage in ("short", "gone"):
        assert sizes.name in caplog.text
    if damage == "named badly":
        assert "`t2i data index` again" in caplog.text


def test_an_index_of_before_is_used_and_named(folder, caplog):
    wanted = content(tars(folder))
    index(folder)
    place = folder / "index.json"
    values = json.loads(place.read_text())
    shards = {
        name: {key: entry[key] for key in ("samples", "bytes")} for name, entry in values["shards"].items()
    }
    place.write_text(json.dumps({"version": 1, "shards": shards}))
    caplog.clear()
    assert content(tars(folder)) == wanted
    assert f"{place} does not have the sizes of pictures: `t2i data index` again" in caplog.text
    assert index(folder).skipped == 5
    caplog.clear()
    assert content(tars(folder)) == wanted
    assert caplog.text.count("data index") == 0


def test_a_shard_that_changed_since_is_asked_itself(folder, caplog):
    index(folder)
    changed = folder / "00000.tar"
    changed.write_bytes((folder / "00004.tar").read_bytes() + bytes(10240))
    wanted = content(tars(folder))
    assert "00000.tar has changed since it was indexed" in caplog.text
    for path in folder.glob("*index*"):
        path.unlink()
    assert content(tars(folder)) == wanted


def test_a_second_call_opens_only_what_changed(folder, monkeypatch):
    first = index(folder)
    written = (folder / "index.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(indexing, "_index_one", None)
        again = index(folder)
    assert (again.shards, again.skipped, again.samples, again.flaws) == (0, 5, first.samples, first.flaws)
    assert first.flaws == {"duplicate": 1}
    assert (folder / "index.json").read_bytes() == written
    path = folder / "00003.tar"  # the same size in bytes, another time
    with tarfile.open(folder / "00003.tar") as old, tarfile.open(folder / "new", "w") as new:
        for member in old:
            data = old.extractfile(member)
            member.name = member.name.replace("000030000", "000030009")
            new.addfile(member, data)
    (folder / "new").replace(path)
    os.utime(path, (time.time() - 60,) * 2)
    changed = index(folder)
    assert (changed.shards, changed.skipped) == (1, 4)
    assert len(list(folder.glob("index.*.sizes"))) == 1
    assert "000030009" in everything(opened([path]))[0]


def test_an_index_of_another_version_is_made_anew(folder, monkeypatch):
    index(folder)
    for module in (indexing, index_module):
        monkeypatch.setattr(module, "INDEX_VERSION" if module is indexing else "VERSION", 99)
    assert index(folder).shards == 5
    assert index(folder).skipped == 5


@pytest.mark.parametrize("gone", ["00001.index.npz", "index.sizes", "index.json"])
def test_what_is_missing_is_written_again(folder, gone):
    index(folder)
    place = next(folder.glob(gone.replace("index.sizes", "index.*.sizes")))
    place.unlink()
    index(folder)
    assert list(folder.glob(gone.replace("index.sizes", "index.*.sizes")))
    assert len(list(folder.glob("*.index.npz"))) == 5


def test_shards_may_be_indexed_a_few_at_a_time(folder):
    wanted = content(tars(folder))
    index(folder, tars(folder)[3:])
    index(folder, tars(folder)[:3])
    (folder / "00004.tar").rename(folder.parent / "00004.tar")
    assert index(folder, tars(folder)[:2]).samples == 7 + 6
    values = json.loads((folder / "index.json").read_text())["shards"]
    assert sorted(values) == [f"{number:05d}.tar" for number in range(4)]
    assert all("first" in entry for entry in values.values())
    (folder.parent / "00004.tar").rename(folder / "00004.tar")
    assert content(tars(folder)) == wanted


def test_statistics_that_come_later_are_seen(folder):
    index(folder)
    (folder / "00000_stats.json").write_text('{"successes": 9}')
    os.utime(folder / "00000_stats.json", (time.time() - 60,) * 2)
    assert index(folder).samples == 9 + 6 + 0 + 8 + 8


def test_a_shard_on_a_disk_that_hangs_is_left_at_the_deadline(folder, monkeypatch):
    index(folder)
    from t2i.data import sources

    look = sources._size_now
    monkeypatch.setattr(sources, "_size_now", lambda url: time.sleep(9) if "00001" in url else look(url))
    began = time.monotonic()
    found = sources.sizes([*tars(folder), "nowhere"], sources.Limits(0.2))
    assert time.monotonic() - began < 5
    wanted = [os.stat(path).st_size for path in tars(folder)]
    assert found.tolist() == [wanted[0], sources.UNREADABLE, *wanted[2:], sources.MISSING]


def test_sizes_that_two_bytes_cannot_say_keep_their_shape():
    sizes = as_stored(np.array([[70000, 40000], [1, 131070], [0, 99999], [65535, 3]], dtype=np.int32))
    assert sizes.tolist() == [[65535, 37448], [1, 65535], [0, 65535], [65535, 3]]


def test_the_nearest_bucket_is_that_of_all_distances():
    shapes = bucket_shapes(1024, 64, 4.0)
    sizes = np.random.default_rng(0).integers(0, 3000, (20_000, 2)).astype(np.uint16)
    sizes[:100] = [(64 * (i + 1), 64 * (100 - i)) for i in range(100)]
    aspects = np.log([height / width for height, width in shapes])
    known = (sizes > 0).all(axis=1)
    wanted = np.zeros(len(sizes))
    wanted[known] = np.log(sizes[known, 0].astype(float) / sizes[known, 1].astype(float))
    assert assign(sizes, shapes).tolist() == np.abs(wanted[:, None] - aspects).argmin(axis=1).tolist()
    assert assign(sizes, shapes[:1]).tolist() == [0] * len(sizes)


def test_samples_that_are_lost_keep_their_count(folder):
    index(folder)
    shards = opened(tars(folder))
    shards.keep(10_000)
    found = list(shards.read([(1, 0), (3, 1), (3, 2)]))
    assert shards.sizes.tolist() == [0, 1, 0, 3, 0]
    assert [type(answer) for answer in found] == [BadSample] * 3


def test_two_processes_write_what_one_does(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    reports = [index(folder), index(tmp_path / "other", processes=2)]
    assert reports[0] == reports[1]
    written = [
        {p.name: p.read_bytes() for p in each.glob("*.index.npz")} for each in (folder, tmp_path / "other")
    ]
    assert len(written[0]) == 5
    assert written[0] == written[1]
