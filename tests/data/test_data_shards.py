"""The shards of a dataset: where their sizes come from, and what is said and counted where they are not as they should
be."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from data_samples import encode, good_members, noise
from servers import web_server
from torch.utils.data import DataLoader

from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.data.loader import build_loader
from t2i.data.shards import Raw, Shards
from t2i.data.sources import Limits
from t2i.data.store import ShardStore
from t2i.data_config import DataConfig, MixturePart
from t2i.errors import DataError
from t2i_pipelines import indexing
from t2i_pipelines.selection import write_selection

QUICK = Limits(deadline_s=2.0, attempts=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    with web_server(tmp_path) as served:
        yield served


@pytest.fixture
def shard(write_tar):
    """shard(3, samples=4): 00003.tar with the keys 000030000 ... 000030003."""

    def write(number: int, samples: int, first: int = 0) -> Path:
        content = {f"{number:05d}{i:04d}": good_members(100 * number + i) for i in range(first, samples)}
        return write_tar(f"{number:05d}.tar", content)

    return write


def opened(urls, max_bad_share=0.0, limits=QUICK) -> Shards:
    return Shards([str(url) for url in urls], ShardStore(limits), max_bad_share=max_bad_share)


def everything(shards: Shards) -> tuple[list[str], Counter]:
    """Keys of what can be read, and causes of what cannot."""
    places = [(shard, i) for shard in range(len(shards)) for i in range(int(shards.sizes[shard]))]
    found = shards.read(places)
    bad = Counter(each.cause for each in found if isinstance(each, BadSample))
    return [each.key for each in found if isinstance(each, Raw)], bad


def index(paths, out=None):
    """What `t2i data index` does, in this process."""
    sizes = {}
    for path in paths:
        samples, size_bytes, _, _ = indexing._index_one(str(path), indexing._place(str(path), out))
        sizes[path.name] = {"samples": samples, "bytes": size_bytes}
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
    assert "holds 1 samples more than it is listed with" in caplog.text


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
    assert "1 samples more than it is listed with" in caplog.text


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
    shards.keep(lambda sizes: (sizes.min(axis=1) >= 120) | (sizes.min(axis=1) == 0))
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
    sizes = np.concatenate([shards.original_px(shard) for shard in range(3)])
    assert sizes[:, 1].tolist() == [100] * 2 + [0] * 2 + [110] * 4 + [120] * 4


def test_a_shard_that_shrinks_after_samples_were_left_out_does_not_crash(shard):
    path = shard(0, 9)
    shards = opened([path])
    shards.keep(lambda sizes: np.arange(len(sizes)) % 2 == 0)
    shard(0, 3)
    keys, bad = everything(pickle.loads(pickle.dumps(shards)))  # as another process gets them
    assert keys == ["000000000", "000000002"]
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
    data = DataConfig(source=None, shards=str(tmp_path / "some" / "kept.arrow"), max_bad_share=1.0)
    (batch,) = take(data, 1, batch_size=4)
    assert set(batch.key) == {"000000003", "000000001", "000010002"}
    assert batch.bad == {"missing": 1}


def test_a_selection_of_shards_on_a_server(shard, server, tmp_path):
    url, _ = server
    shard(0, 4)
    write_selection(tmp_path / "kept.arrow", [f"{url}/00000.tar"], [pa.array(["000000002"])])
    assert everything(opened([tmp_path / "kept.arrow"])) == (["000000002"], {})


def missing(shard, tmp_path):
    return tmp_path / "none.tar", "which does not exist", "missing"


def a_picture(shard, tmp_path):
    (tmp_path / "x.tar").write_bytes(encode(noise(0, 40, 40)))
    return tmp_path / "x.tar", "not an uncompressed tar file", "damaged"


def a_folder(shard, tmp_path):
    (tmp_path / "x.tar").mkdir()
    return tmp_path / "x.tar", "which does not exist", "missing"


def a_pipe(shard, tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    return tmp_path / "x.tar", "which does not exist", "missing"


@pytest.mark.parametrize("kind", [missing, a_picture, a_folder, a_pipe])
def test_a_bad_shard_at_the_start_is_refused_or_counts_once_an_epoch(shard, tmp_path, kind, caplog):
    bad, says, cause = kind(shard, tmp_path)
    paths = [shard(0, 6), shard(1, 5), bad]
    with pytest.raises(DataError) as error:
        opened(paths, max_bad_share=0.3)
    message = str(error.value)
    assert message.startswith(f"data.shards names {bad}, which")
    assert says in message
    assert message.endswith(".")
    assert "\n" not in message
    with pytest.raises(DataError, match=r"\(2 of 3 shards are like that\)"):
        opened([paths[0], bad, bad], max_bad_share=0.5)
    caplog.clear()
    data = DataConfig(source=None, shards=list(map(str, paths)), max_bad_share=0.34)
    batches = take(data, 6, batch_size=4)  # two epochs of 12
    assert Counter(cause for batch in batches for cause, n in batch.bad.items() for _ in range(n)) == {
        cause: 2
    }
    assert "Bad samples an epoch for that: 1." in caplog.text
    assert sum("skipped" in line for line in caplog.messages) == 1


def test_an_unreadable_shard_is_named(shard, tmp_path, monkeypatch):
    """By a permission; the tests may run as root, whom none stops."""
    path = shard(0, 3)
    shard(1, 3)
    opened_by_path = Path.open

    def refused(self, *args, **options):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return opened_by_path(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"names .*00000\.tar, which cannot be read: .*Permission denied"):
        opened([path, tmp_path / "00001.tar"])
    shards = opened([path, tmp_path / "00001.tar"], max_bad_share=0.5)
    assert shards.sizes.tolist() == [1, 3]
    assert everything(shards)[1] == {"unreadable": 1}


@pytest.mark.parametrize(
    ("change", "causes"),
    [
        (lambda path: path.unlink(), {"missing"}),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), {"truncated", "unreadable"}),
        (lambda path: path.write_bytes(b""), {"truncated", "unreadable"}),
        (lambda path: path.write_bytes(os.urandom(20_000)), {"damaged", "unreadable"}),
    ],
)
@pytest.mark.parametrize("was_open", [True, False])
def test_a_shard_that_changes_while_training_is_counted(shard, change, causes, was_open):
    paths = [shard(0, 6), shard(1, 6)]
    data = DataConfig(source=None, shards=list(map(str, paths)), max_bad_share=1.0)
    batches = iter(loader(data, 24, batch_size=12))  # two epochs
    if was_open:
        first = next(batches)
        assert first.bad == {}
    change(paths[1])
    for batch in batches:
        lost = sum(batch.bad.values())
        delivered = {key for key in batch.key if key.startswith("00001")}
        assert set(batch.bad) <= causes
        assert lost + len(delivered) >= 6
        assert {f"00000{i:04d}" for i in range(6)} <= set(batch.key)
        if was_open and not paths[1].exists():
            assert lost == 0  # who has a file open reads on


def test_a_shard_that_is_late_is_left_and_what_comes_late_changes_nothing(shard, monkeypatch):
    """The read of one sample takes longer than the deadline, then comes back."""
    paths = [shard(0, 4), shard(1, 4)]
    shards = opened(paths, limits=Limits(deadline_s=0.3, attempts=1))
    read = ShardIndex.read
    back = threading.Event()

    def slow(self, file, row, extensions=None):
        if self.keys[row] == "000000001" and not back.is_set():
            time.sleep(0.5)
            back.set()
        return read(self, file, row, extensions)

    monkeypatch.setattr(ShardIndex, "read", slow)
    places = [(s, i) for i in range(4) for s in (1, 0)]
    found = shards.read(places)
    assert back.wait(5)
    time.sleep(0.1)
    assert len(found) == 8
    for (s, i), each in zip(places, found, strict=True):
        if s == 1 or i == 0:
            assert isinstance(each, Raw)
            assert each.key == f"{s:05d}{i:04d}"
            assert each.members["txt"] == f"sample {100 * s + i}".encode()
        else:
            assert isinstance(each, BadSample)
            assert each.cause == "unreadable"
            assert "no answer within 0.3 s" in str(each)


def test_a_scan_that_hangs_ends(shard, monkeypatch):
    path = shard(0, 4)
    hang = threading.Event()
    monkeypatch.setattr(ShardIndex, "scan", classmethod(lambda *args: hang.wait(20)))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"00000\.tar, which cannot be read: no answer within"):
        opened([path], limits=Limits(deadline_s=0.05, attempts=1))
    hang.set()
    assert time.monotonic() - began < 5


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


def test_a_prefetch_is_asked_for_once(shard, monkeypatch):
    paths = [str(shard(number, 8)) for number in range(6)]
    asked = []
    monkeypatch.setattr(ShardStore, "prefetch", lambda self, url: asked.append(url))
    data = DataConfig(source=None, shards=paths, shuffle_window_shards=2)
    take(data, 12, batch_size=4)
    assert 1 <= len(asked) <= 6
    assert len(set(asked)) == len(asked)


def loader(data: DataConfig, num_images=None, **options):
    defaults = {"size_px": (8, 10), "batch_size": 4, "text_dropout": 0.0, "min_original_px": 0, "seed": 5}
    return build_loader(data, num_images=num_images, **(defaults | options))


def take(data: DataConfig, count: int, **options):
    batch_size = options.get("batch_size", 4)
    return list(loader(data, count * batch_size, **options))


def with_workers(data: DataConfig, context: str, batches: int, **options) -> list:
    """As `build_loader` makes them, in two worker processes that are started by `context`."""
    made = loader(data, batches * 4, **options)
    workers = DataLoader(
        made.dataset,
        batch_sampler=made.batch_sampler,
        num_workers=2,
        collate_fn=made.collate_fn,
        multiprocessing_context=context,
        timeout=120,
    )
    return list(workers)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_may_be_forked_or_spawned(shard, server, tmp_path, context):
    """Of remote shards, one of them not there; in buckets, mixed: whatever has to travel."""
    url, _ = server
    paths = [shard(0, 5), shard(1, 4)]
    urls = [f"{url}/{path.name}" for path in paths]
    mixture = {"a": {"shards": urls}, "b": {"shards": [*map(str, paths), f"{url}/none.tar"]}}
    parts = {name: MixturePart(**part) for name, part in mixture.items()}
    data = DataConfig(
        source=None, shards=None, mixture=parts, max_bad_share=1.0, bucket_step_px=4, crop="random"
    )
    alone = take(data, 6, size_px=8)
    found = with_workers(data, context, 6, size_px=8)
    assert [batch.key for batch in found] == [batch.key for batch in alone]
    assert all(torch.equal(a.image, b.image) for a, b in zip(alone, found, strict=True))
    assert [batch.bad for batch in found] == [batch.bad for batch in alone]


def test_logs_name_each_bad_sample_of_each_part_once(write_tar, tmp_path, caplog):
    good = {str(i): good_members(i) for i in range(3)}
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(f"{name}/0.tar", good | {"bad": {"txt": b"x"}})
    parts = {name: MixturePart(shards=str(tmp_path / name / "0.tar")) for name in "ab"}
    data = DataConfig(source=None, shards=None, mixture=parts, max_bad_share=1.0)
    with caplog.at_level(logging.WARNING, logger="t2i.data"):
        take(data, 20)
    skipped = [line for line in caplog.messages if line.startswith("skipped")]
    assert sorted(line[: len("skipped a: sample bad: image")] for line in skipped) == [
        "skipped a: sample bad: image",
        "skipped b: sample bad: image",
    ]
