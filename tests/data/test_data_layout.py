"""Samples whose bytes are at hand are read at once, and are those that an index says."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import threading
import time
import weakref

import numpy as np
import pytest
from data_samples import good_members
from open_shards import everything, opened

from t2i.data import layout, mapped
from t2i.data.index import ShardIndex
from t2i.data.layout import Layout
from t2i.data.mapped import map_file
from t2i.data.members import SAMPLE_ENDINGS
from t2i.data.sources import within

needs_nowait = pytest.mark.skipif(not layout.NOWAIT, reason="only Linux reads without waiting")


@pytest.fixture
def mixed(tmp_path):
    """A shard of samples that are not alike: other formats, members that are missing, apart, named alike, long or with
    letters beyond ASCII."""
    samples = {
        "0": good_members(0),
        "1": {"jpg": b"1" * 700, "txt": b"one"},
        "2": {"image.jpg": b"2" * 5, "caption.txt": b"two", "json": b"{}"},
        "ü3": good_members(3),
        "4": {"txt": b""},
        "n" * 120: good_members(5),
        "6": {"JPG": b"6" * 3000, "txt": b"six", "json": b"{}"},
        "7": {"png": b"7", "bin": bytes(200_000), "txt": b"seven"},
    }
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for key, members in [*samples.items(), ("7", {"png": b"again"})]:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def unmapped(monkeypatch):
    """As on a file system that asks a server."""
    monkeypatch.setattr(mapped, "LOCAL", ())


@needs_nowait
@pytest.mark.parametrize("is_mapped", [True, False])
@pytest.mark.parametrize("endings", [None, SAMPLE_ENDINGS, ("txt",)])
def test_what_is_read_at_once_is_what_the_index_reads(mixed, endings, is_mapped):
    index = ShardIndex.scan(mixed)
    rows = np.array([5, 0, 1, -1, 2, 3, 4, 6, 7, 8])
    with mixed.open("rb") as file:
        whole = map_file(file.fileno(), 5) if is_mapped else None
        at_hand = Layout(file.fileno(), index, rows, endings, mapped=whole)
        found = [at_hand.read(place) for place in range(len(rows))]
        for row, raw in zip(rows.tolist(), found, strict=True):
            if raw is not None:
                assert raw.key == raw.key_in_shard == index.keys[row]
                assert raw.members == index.read(file.fileno(), row, endings)
        at_once = {row for row, raw in zip(rows.tolist(), found, strict=True) if raw is not None}
        # Left to the index: a name too long for a header, what is not there, what the tar file lost.
        assert {0, 1, 2, 3, 4} <= at_once | ({2, 3} if endings == ("txt",) else set())
        assert not at_once & {-1, 5, 8}


@needs_nowait
def test_nothing_is_handed_to_a_thread_where_the_bytes_are_at_hand(shard, monkeypatch, unmapped):
    shards = opened([shard(0, 4), shard(1, 4)])
    wanted = everything(shards)
    monkeypatch.setattr("t2i.data.shards.within", None)
    assert everything(shards) == wanted
    assert wanted[1] == {}
    assert len(wanted[0]) == 8


@pytest.mark.parametrize("refusal", [errno.EAGAIN, errno.EOPNOTSUPP, "part"])
def test_what_is_not_at_hand_is_waited_for(shard, monkeypatch, unmapped, refusal):
    shards = opened([shard(0, 4), shard(1, 4)])
    wanted = everything(shards)
    asked = []

    def preadv(file, buffers, *of):
        asked.append(file)
        if refusal == "part":
            return 100
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "preadv", preadv, raising=False)
    assert everything(shards) == wanted
    assert len(asked) == (8 if layout.NOWAIT else 0)


@needs_nowait
@pytest.mark.parametrize("at", [0, 124, 1024 + 2, 1024 + 130])
def test_another_header_than_the_one_that_was_indexed_is_not_taken(write_tar, at):
    path = write_tar("s.tar", {f"{i}": {"json": b"{}", "txt": b"x" * 9} for i in range(3)})
    index = ShardIndex.scan(path)
    content = bytearray(path.read_bytes())
    content[2048 + at] = ord("3")
    path.write_bytes(content)
    with path.open("rb") as file:
        found = [Layout(file.fileno(), index, np.arange(3), None).read(place) for place in range(3)]
    assert [raw is None for raw in found] == [False, True, False]


@needs_nowait
def test_threads_do_not_read_into_one_another(mixed):
    index = ShardIndex.scan(mixed)
    with mixed.open("rb") as file:
        at_hand = Layout(file.fileno(), index, np.arange(len(index)), None)
        wanted = [at_hand.read(place) for place in range(len(index))]
        wrong = []

        def read_on(place):
            for _ in range(300):
                if at_hand.read(place) != wanted[place]:
                    wrong.append(place)

        threads = [threading.Thread(target=read_on, args=(place,)) for place in (0, 1, 6, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_calls_with_a_deadline_share_a_thread_until_one_hangs():
    first = within(5, threading.get_ident)
    assert within(5, threading.get_ident) == first != threading.get_ident()
    assert within(5, lambda: within(5, threading.get_ident)) not in (first, threading.get_ident())
    go_on = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        within(0.05, go_on.wait)
    assert within(5, lambda: 7) == 7  # the one that hangs stands in nobody's way
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    go_on.set()
    before = threading.active_count()
    thread = threading.Thread(target=lambda: within(5, int))
    thread.start()
    thread.join()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before  # its helper went with it


def test_a_call_with_a_deadline_holds_on_to_nothing():
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    within(5, lambda held=held: None)
    del held
    until = time.monotonic() + 5
    while gone() is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_has_a_thread_of_its_own():
    within(5, int)
    child = os.fork()
    if not child:
        os._exit(within(5, lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
