"""Shards that are mapped into memory, when they are not, and what is noticed of their changes."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections import Counter
from weakref import WeakSet

import numpy as np
import pytest
from data_configs import data_config
from data_samples import good_members
from open_shards import everything, loader, opened

from t2i.data import mapped
from t2i.data.decode import BadSample
from t2i.data.index import ShardIndex
from t2i.data.layout import Layout
from t2i.data.mapped import map_file
from t2i.data.shards import Raw
from t2i.data.sources import Limits


@pytest.fixture(autouse=True)
def mappable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "_made", WeakSet())
    (tmp_path / "file").write_bytes(b"x")
    with (tmp_path / "file").open("rb") as file:
        if map_file(file.fileno(), 5) is None:
            pytest.skip("files of this system are not mapped")


def are_mapped(shards) -> list[bool]:
    """Of the open shards."""
    return [
        each.layout.mapped is not None and each.layout.mapped.data is not None
        for each in shards._open._open.values()
    ]


def places(shards):
    return [(shard, place) for shard in range(len(shards)) for place in range(int(shards.sizes[shard]))]


def test_a_small_local_shard_is_mapped_and_read_without_a_call_of_the_system(shard, monkeypatch):
    shards = opened([shard(0, 4), shard(1, 4)])
    wanted = shards.read(places(shards))
    assert are_mapped(shards) == [True, True]
    for name in ("pread", "preadv"):
        monkeypatch.setattr(os, name, None)
    monkeypatch.setattr("t2i.data.shards.within", None)
    assert shards.read(places(shards)) == wanted
    assert [raw.members for raw in wanted] == [good_members(i) for i in (0, 1, 2, 3, 100, 101, 102, 103)]


def not_local(monkeypatch):
    monkeypatch.setattr(mapped, "LOCAL", {"nfs4"})


def too_large(monkeypatch):
    monkeypatch.setattr(mapped, "MAX_FILE_BYTES", 1000)


def refused(monkeypatch):
    monkeypatch.setattr(mapped, "POPULATE_READ", 9999)  # as a system does that is too old for it


def never_comes(monkeypatch):
    monkeypatch.setattr(mapped, "_at_hand", lambda file, size: threading.Event().wait(20))


def no_proc(monkeypatch):
    def missing(*of):
        raise FileNotFoundError

    monkeypatch.setattr(mapped, "_is_local", missing)


def in_a_chroot(monkeypatch):
    proc("mnt_id:\t70001\n", monkeypatch)


def no_number_of_a_mount(monkeypatch):
    proc("pos:\t0\n", monkeypatch)


def proc(file, monkeypatch):
    """As /proc is where only the mount 1 is seen."""
    told = {"fdinfo": file, "mountinfo": "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"}

    def opened(path, **how):
        return io.StringIO(told["fdinfo" if "fdinfo" in path else "mountinfo"])

    monkeypatch.setattr(mapped, "open", opened, raising=False)


NOT_MAPPED = [not_local, too_large, refused, never_comes, no_proc, in_a_chroot, no_number_of_a_mount]


@pytest.mark.parametrize("why_not", NOT_MAPPED)
def test_what_is_not_mapped_is_read_all_the_same(shard, monkeypatch, why_not):
    paths = [shard(0, 4), shard(1, 4)]
    whole = opened(paths)
    wanted = whole.read(places(whole))
    why_not(monkeypatch)
    shards = opened(paths, limits=Limits(deadline_s=0.2, attempts=1))
    assert shards.read(places(shards)) == wanted
    assert are_mapped(shards) == [False, False]


def test_the_file_system_is_that_of_the_mount(tmp_path, monkeypatch):
    """A descriptor in /proc is the one file system that is everywhere and not local."""
    assert mapped.LOCAL.isdisjoint(
        {"nfs", "nfs4", "cifs", "fuse", "lustre", "ceph", "9p", "virtiofs", "proc"}
    )
    with open("/proc/self/status", "rb") as file:
        assert not mapped._is_local(file.fileno(), os.fstat(file.fileno()).st_dev)


def test_the_oldest_give_way_and_are_read_all_the_same(shard, monkeypatch):
    paths = [shard(number, 4) for number in range(3)]
    monkeypatch.setattr(mapped, "MAX_BYTES", 2 * paths[0].stat().st_size)
    shards = opened(paths)
    wanted = shards.read(places(shards))
    assert are_mapped(shards) == [False, True, True]
    assert shards.read(places(shards)) == wanted
    assert [raw.members for raw in wanted] == [good_members(100 * s + i) for s in range(3) for i in range(4)]
    assert shards.read([(0, 1)])[0].key == "000000001"
    assert are_mapped(shards) == [True, True, False]  # now last asked for: the first, which stays as it is


def test_what_is_closed_is_not_mapped_any_more(shard):
    shards = opened([shard(0, 4)])
    shards.read([(0, 0)])
    assert len(mapped._made) == 1
    shards._open.close()
    assert len(mapped._made) == 0


def cut_short(path):
    os.truncate(path, 3000)
    return {"unreadable"}


def emptied(path):
    os.truncate(path, 0)
    return {"unreadable"}


def overwritten(path):
    """Of the same size; only the time of the change tells."""
    path.write_bytes(os.urandom(path.stat().st_size))
    return {"unreadable"}


@pytest.mark.parametrize("change", [cut_short, emptied, overwritten])
def test_a_change_in_place_is_noticed_by_the_next_batch(shard, change):
    shards = opened([shard(0, 6), shard(1, 6)])
    before = shards.read(places(shards))
    assert are_mapped(shards) == [True, True]
    time.sleep(0.02)  # longer than the clock of file systems takes for a step
    causes = change(shard(1, 6))
    found = shards.read(places(shards))
    assert are_mapped(shards) == [True, False]
    assert found[:6] == before[:6]
    lost = Counter(each.cause for each in found[6:] if isinstance(each, BadSample))
    assert set(lost) == causes
    for each, was in zip(found[6:], before[6:], strict=True):
        assert isinstance(each, BadSample) or each == was  # never other bytes under an old name


def test_a_shard_in_the_place_of_one_that_is_open_is_read_when_it_is_opened(shard, tmp_path):
    """Who has a file open reads on."""
    path = shard(0, 4)
    shards = opened([path])
    before = shards.read(places(shards))
    (tmp_path / "new").write_bytes(os.urandom(path.stat().st_size))
    (tmp_path / "new").replace(path)
    assert shards.read(places(shards)) == before
    shards._open.close()
    assert {each.cause for each in shards.read(places(shards))} <= {"damaged", "unreadable"}


@pytest.mark.parametrize("at", [0, 2, 124, 130, 1024, 1024 + 4, 1024 + 134])
def test_a_header_that_is_not_the_indexed_one_is_not_taken(write_tar, at):
    """Its name or its size."""
    path = write_tar("s.tar", {f"{i}": {"json": b"{}", "txt": b"x" * 9} for i in range(3)})
    index = ShardIndex.scan(path)
    content = bytearray(path.read_bytes())
    content[2048 + at] ^= 1
    path.write_bytes(content)
    with path.open("rb") as file:
        whole = map_file(file.fileno(), 5)
        layout = Layout(file.fileno(), index, np.arange(3), None, mapped=whole)
        found = [layout.read(place) for place in range(3)]
    assert [raw is None for raw in found] == [False, True, False]


@pytest.mark.parametrize(("aged_s", "looks"), [(60, False), (0, True)])
def test_headers_are_looked_at_unless_the_file_is_surely_the_one_indexed(
    write_tar, monkeypatch, aged_s, looks
):
    """What was written a moment ago may change again without a new time of change."""
    path = write_tar("s.tar", {f"{i}": {"txt": b"x" * 9} for i in range(3)})
    os.utime(path, (time.time() - aged_s,) * 2)
    index = ShardIndex.from_bytes(ShardIndex.scan(path).to_bytes(), "s")
    looked = []

    def are_headers(*args):
        looked.append(args)
        return np.ones(3, dtype=bool)

    monkeypatch.setattr("t2i.data.layout._are_headers", are_headers)

    def read():
        with path.open("rb") as file:
            layout = Layout(file.fileno(), index, np.arange(3), None, mapped=map_file(file.fileno(), 5))
            return [layout.read(place).members["txt"] for place in range(3)]

    assert read() == [b"x" * 9] * 3
    assert bool(looked) is looks
    os.utime(path, (time.time() - 30,) * 2)
    assert read() == [b"x" * 9] * 3
    assert looked


def test_what_is_mapped_ahead_leaves_the_ones_in_use_their_place(shard, monkeypatch):
    paths = [shard(number, 4) for number in range(4)]
    monkeypatch.setattr(mapped, "MAX_BYTES", 2 * paths[0].stat().st_size)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")).fileno() for path in paths]
        old, used = map_file(files[0], 5), map_file(files[1], 5)
        assert old.holds()
        assert used.holds()
        ahead = map_file(files[2], 5, ahead=True)
        assert ahead is not None
        assert old.data is None
        assert used.holds()
        assert ahead.holds()
        assert used.holds()
        assert map_file(files[3], 5) is not None
        assert ahead.data is None  # asked for before the other
        monkeypatch.setattr(mapped, "MAX_BYTES", paths[0].stat().st_size)
        assert map_file(files[2], 5, ahead=True) is None


def test_a_file_that_is_shorter_than_its_index_says_gives_no_part_of_a_sample(write_tar):
    path = write_tar("s.tar", {f"{i}": {"txt": b"x" * 700} for i in range(3)})
    index = ShardIndex.scan(path)
    os.truncate(path, 2 * 1536 + 512 + 300)
    with path.open("rb") as file:
        layout = Layout(file.fileno(), index, np.arange(3), None, mapped=map_file(file.fileno(), 5))
        assert [layout.read(place) is None for place in range(3)] == [False, False, True]


def test_a_key_with_a_zero_byte_is_left_to_the_index(write_tar):
    path = write_tar("s.tar", {f"{i}": {"txt": b"x"} for i in range(3)})
    index = ShardIndex.scan(path)
    index.keys[1] = "a\0b"
    with path.open("rb") as file:
        layout = Layout(file.fileno(), index, np.arange(3), None, mapped=map_file(file.fileno(), 5))
        assert [layout.read(place) for place in range(3)] == [None] * 3


def test_batches_are_the_same_mapped_or_not(shard, monkeypatch):
    paths = [str(shard(number, 5)) for number in range(3)]
    data = data_config(shards=paths, shuffle_window_shards=2)
    batches = list(loader(data, 28))
    not_local(monkeypatch)
    again = list(loader(data, 28))
    assert [batch.key for batch in again] == [batch.key for batch in batches]
    assert all((a.image == b.image).all() for a, b in zip(again, batches, strict=True))
    assert isinstance(opened(paths).read([(0, 0)])[0], Raw)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_reads_what_was_mapped_before(shard):
    shards = opened([shard(0, 4)])
    wanted = everything(shards)
    child = os.fork()
    if not child:
        os._exit(0 if everything(shards) == wanted else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
