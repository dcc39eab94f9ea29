"""Shards that are bad at the start, change or hang while they are read, or are read in other processes."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_configs import data_config
from data_samples import encode, good_members, noise
from open_shards import everything, loader, opened, take
from servers import web_server
from torch.utils.data import DataLoader

from t2i.data.ahead import Ahead
from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.data.shards import Raw
from t2i.data.sources import Limits
from t2i.data.store import ShardStore
from t2i.data_config import DataConfig, MixturePart
from t2i.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path):
    with web_server(tmp_path) as served:
        yield served


def missing(shard, tmp_path):
    return tmp_path / "none.tar", "which does not exist", "missing"


def a_picture(shard, tmp_path):
    (tmp_path / "x.tar").write_bytes(encode(noise(0, 40, 40)))
    return tmp_path / "x.tar", "not an uncompressed tar file", "damaged"


def a_folder(shard, tmp_path):
    (tmp_path / "x.tar").mkdir()
    return tmp_path / "x.tar", "which cannot be read: Is a directory.", "unreadable"


def a_pipe(shard, tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    return tmp_path / "x.tar", "which cannot be read: it is no file.", "unreadable"


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
    data = data_config(shards=list(map(str, paths)), max_bad_share=0.34)
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
    data = data_config(shards=list(map(str, paths)), max_bad_share=1.0)
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
    monkeypatch.setattr("t2i.data.layout.NOWAIT", 0)  # as if nothing were at hand
    monkeypatch.setattr("t2i.data.mapped.LOCAL", ())
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


def test_a_shard_is_opened_ahead_once_and_in_the_background(shard, monkeypatch):
    paths = [str(shard(number, 8)) for number in range(6)]
    opened_in: list[tuple[str, bool]] = []
    open_tar = ShardStore.open_tar

    def noted(self, url):
        opened_in.append((url, threading.current_thread() is threading.main_thread()))
        return open_tar(self, url)

    monkeypatch.setattr(ShardStore, "open_tar", noted)
    data = data_config(shards=paths, shuffle_window_shards=2)
    made = loader(data, 48, batch_size=4)
    opened_in.clear()
    batches = []
    for batch in made:
        (part,) = made.dataset.stream.parts
        for answer in list(part.reader.shards._ahead._answers.values()):
            answer.exception(timeout=20)  # without it the batch might be faster
        batches.append(batch)
    assert sum(len(batch.key) for batch in batches) == 48
    assert sorted(url for url, _ in opened_in) == sorted(paths)
    assert sum(first for _, first in opened_in) == 2  # those of the first batch


@pytest.mark.parametrize("error", [OSError("gone"), DataError("damaged")])
def test_what_went_wrong_ahead_is_tried_again_when_the_shard_is_asked_for(shard, monkeypatch, error):
    shards = opened([shard(0, 4), shard(1, 4)])
    open_now, failed = shards._open_now, []

    def fails_first(number):
        if not failed:
            failed.append(number)
            raise error
        return open_now(number)

    monkeypatch.setattr(shards, "_open_now", fails_first)
    shards.prefetch(1)
    shards._ahead._answers[1].exception(timeout=20)
    assert failed == [1]
    assert shards.read([(1, 2)])[0].key == "000010002"


def test_nobody_waits_for_what_has_not_begun(shard, monkeypatch):
    shards = opened([shard(0, 4), shard(1, 4)])
    hang = threading.Event()
    shards._ahead.begin(0, lambda: hang.wait(20))
    shards.prefetch(1)
    began = time.monotonic()
    assert shards.read([(1, 2)])[0].key == "000010002"
    assert time.monotonic() - began < 10
    hang.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_has_a_background_of_its_own():
    ahead = Ahead()
    ahead.begin("before", os.getpid)
    ahead.begin("parent", os.getpid)
    ahead._answers["parent"].result(timeout=20)
    child = os.fork()
    if not child:
        nothing = ahead.take("before")
        ahead.begin("child", os.getpid)
        ahead._answers["child"].result(timeout=20)
        os._exit(0 if (nothing, ahead.take("child")) == (None, os.getpid()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ahead.take("before") == ahead.take("parent") == os.getpid()
    assert ahead.take("parent") is None


def with_workers(data: DataConfig, context: str, batches: int, **options) -> list:
    """As `build_loader` makes them, in two worker processes that are started by `context`."""
    made = loader(data, batches * 4, **options)
    workers = DataLoader(
        made.dataset,
        sampler=made.sampler,
        batch_size=None,
        num_workers=2,
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
    data = data_config(
        source=None, shards=None, mixture=parts, max_bad_share=1.0, bucket_step_px=4, crop="random"
    )
    alone = take(data, 6, size_px=8)
    found = with_workers(data, context, 6, size_px=8)
    assert [batch.key for batch in found] == [batch.key for batch in alone]
    assert all(torch.equal(a.image, b.to("cpu").image) for a, b in zip(alone, found, strict=True))
    assert [batch.bad for batch in found] == [batch.bad for batch in alone]


def test_logs_name_each_bad_sample_of_each_part_once(write_tar, tmp_path, caplog):
    good = {str(i): good_members(i) for i in range(3)}
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tar(f"{name}/0.tar", good | {"bad": {"txt": b"x"}})
    parts = {name: MixturePart(shards=str(tmp_path / name / "0.tar")) for name in "ab"}
    data = data_config(shards=None, mixture=parts, max_bad_share=1.0)
    with caplog.at_level(logging.WARNING, logger="t2i.data"):
        take(data, 20)
    skipped = [line for line in caplog.messages if line.startswith("skipped")]
    assert sorted(line[: len("skipped a: sample bad: image")] for line in skipped) == [
        "skipped a: sample bad: image",
        "skipped b: sample bad: image",
    ]
