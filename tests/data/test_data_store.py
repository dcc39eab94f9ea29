"""Bytes from elsewhere: every protocol, every trouble, nothing hangs."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from servers import web_server

from t2i.data import sources
from t2i.data.sources import Limits, SourceError
from t2i.data.store import ShardStore, cache_folder
from t2i.errors import DataError

QUICK = Limits(deadline_s=0.5, attempts=2)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(URL, folder, handler) of a web server on this machine."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda s, sleep=time.sleep: sleep(min(s, 0.1)))
    with web_server(tmp_path / "web") as (url, handler):
        yield url, tmp_path / "web", handler


def parts() -> list[Path]:
    return [path for path in cache_folder().glob("*") if not path.name.endswith(".lock")]


def test_braces_lists_and_pipes():
    assert sources.expand(["{a..b}/{0..1}.tar", "s3://x/{07..08}.tar"]) == [
        *("a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"),
        *("s3://x/07.tar", "s3://x/08.tar"),
    ]
    assert sources.expand("a{1..2}.tar::b.tar") == ["a1.tar", "a2.tar", "b.tar"]
    assert sources.expand("pipe:cat a{1..2}.tar") == ["pipe:cat a1.tar", "pipe:cat a2.tar"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("folder", "SHARDS is '.*folder', a folder"), ("*.tar", r"SHARDS is '.*\*\.tar', which does not exist")],
)
def test_folders_and_patterns_are_no_shards(tmp_path, name, said):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=said + r"; allowed: .*\{00000\.\.00004\}\.tar"):
        sources.expand([str(tmp_path / name)], "SHARDS")
    (tmp_path / "a*.tar").touch()
    assert sources.expand(str(tmp_path / "a*.tar")) == [str(tmp_path / "a*.tar")]


@pytest.mark.parametrize("trouble", ["", "no_ranges", "drop_once"])
def test_a_shard_behind_a_url_is_copied_once(server, trouble):
    url, folder, handler = server
    content = os.urandom(3_000_000)
    (folder / "a.tar").write_bytes(content)
    handler.trouble["a.tar"] = trouble
    for _ in range(2):
        store = ShardStore(QUICK)
        assert store.path(f"{url}/a.tar?token=1").read_bytes() == content
    wanted = 1 if trouble == "" else 2
    assert sum(asked == "GET /a.tar" for asked in handler.asked) <= wanted
    assert parts() == [store.path(f"{url}/a.tar?token=1")]


@pytest.mark.parametrize(
    ("trouble", "says", "missing"),
    [
        ("404", "does not exist", True),
        ("403", "cannot be read", False),
        ("hang", "no answer within 0.5 s", False),
        ("drop", "after 2 attempts", False),
    ],
)
def test_trouble_ends_in_bounded_time_with_a_sentence_and_no_shard(server, trouble, says, missing):
    url, folder, handler = server
    (folder / "a.tar").write_bytes(bytes(1_000_000))
    handler.trouble["a.tar"] = trouble
    began = time.monotonic()
    with pytest.raises(SourceError, match=says) as error:
        ShardStore(QUICK).path(f"{url}/a.tar")
    assert time.monotonic() - began < 10
    assert error.value.missing == missing
    assert f"{url}/a.tar" in str(error.value)
    assert parts() == []


def test_processes_that_wait_do_not_fetch_again(server):
    url, folder, handler = server
    (folder / "a.tar").write_bytes(bytes(1_000_000))
    store = ShardStore(Limits())
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(store.path(f"{url}/a.tar"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert sum(asked == "GET /a.tar" for asked in handler.asked) == 1


def test_what_is_brought_is_there_before_it_is_asked_for(server):
    url, folder, handler = server
    (folder / "a.tar").write_bytes(b"x")
    store = ShardStore(Limits())
    with pytest.raises(SourceError):
        store.bring(f"{url}/missing.tar")
    store.bring(f"{url}/a.tar")
    handler.trouble["a.tar"] = "404"
    assert store.path(f"{url}/a.tar").read_bytes() == b"x"


def test_copies_stay_within_their_size_and_the_least_recently_opened_goes_first(server):
    url, folder, _ = server
    for name in "abcd":
        (folder / f"{name}.tar").write_bytes(name.encode() * 400_000)
    store = ShardStore(Limits(), max_gib=1_000_000 / 2**30)
    first = store.path(f"{url}/a.tar")
    with first.open("rb") as held:
        for name in ("a", "b", "b", "c", "d", "d"):
            store.path(f"{url}/{name}.tar")
            os.utime(store.path(f"{url}/{name}.tar"), (ord(name), ord(name)))
            assert sum(path.stat().st_size for path in parts()) <= 1_000_000
        assert not first.exists()
        assert held.read(1) == b"a"  # whoever had it open reads on
    assert {path.read_bytes()[:1] for path in parts()} == {b"c", b"d"}


def test_pipes_run_only_where_they_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.tar").write_bytes(b"abc")
    pipe = f"pipe:cat {tmp_path}/a.tar"
    assert ShardStore(QUICK, allow_pipes=True).path(pipe).read_bytes() == b"abc"
    marker = tmp_path / "ran"
    with pytest.raises(SourceError, match="only where the command line names it"):
        ShardStore(QUICK).path(f"pipe:touch {marker}")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("command", "says"), [("false", "ended with status 1"), ("echo x; sleep 20", "no answer within 0.5 s")]
)
def test_a_pipe_that_fails_or_hangs_is_named(tmp_path, monkeypatch, command, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    began = time.monotonic()
    with pytest.raises(SourceError, match=says):
        ShardStore(QUICK, allow_pipes=True).path(f"pipe:{command}")
    assert time.monotonic() - began < 10
    assert parts() == []


def test_a_protocol_that_is_not_there_is_said():
    with pytest.raises(SourceError, match=r"nonsense://bucket/x\.tar cannot be read"):
        ShardStore(QUICK).path("nonsense://bucket/x.tar")


def test_a_full_or_forbidden_disk_is_said(server, monkeypatch):
    url, folder, _ = server
    (folder / "a.tar").write_bytes(b"x")

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "copy", no_room)
    with pytest.raises(SourceError, match="takes no copy: No space left on device"):
        ShardStore(QUICK).path(f"{url}/a.tar")


@pytest.mark.parametrize("method", ["mkdir", "open"])
def test_a_cache_that_cannot_be_written_is_said(server, monkeypatch, method):
    url, folder, _ = server
    (folder / "a.tar").write_bytes(b"x")

    def refused(path, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, method, refused)
    cannot = rf"^{url}/a\.tar cannot be read: {cache_folder()} takes no copy: Read-only file system\.$"
    with pytest.raises(SourceError, match=cannot):
        ShardStore(QUICK).path(f"{url}/a.tar")
