"""Files that are there whole or not at all, and where those of a user's cache lie."""

from __future__ import annotations

import errno
import os
import resource
import stat
import tempfile
import time
from pathlib import Path

import pytest

from t2i.files import LEFT_AFTER_S, user_cache, written_whole
from t2i_pipelines.places import check_writable


def test_the_name_is_given_when_all_is_written(tmp_path):
    path = tmp_path / "new" / "file"
    with written_whole(path) as unfinished:
        unfinished.write_text("a")
        assert not path.exists()
    assert path.read_text() == "a"
    assert list(path.parent.iterdir()) == [path]


def test_after_an_error_what_was_there_stays_and_nothing_is_left(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with written_whole(path) as unfinished:
            unfinished.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_at_once_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with written_whole(path) as first:
        first.write_text("first")
        with written_whole(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    path, killed, alive = (
        tmp_path / name for name in ("file[1]", ".file[1].0.unfinished", ".file[1].1.unfinished")
    )
    for left in (killed, alive):
        left.touch()
    past = time.time() - LEFT_AFTER_S - 1
    os.utime(killed, (past, past))
    with written_whole(path) as unfinished:
        unfinished.touch()
    assert not killed.exists()
    assert alive.exists()


def test_a_folder_of_many_files_is_not_listed_for_each(tmp_path, monkeypatch):
    """`t2i data index` writes one file for each of hundreds of thousands of shards."""
    listed = []
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, *of: listed.append(self) or glob(self, *of))
    for number in range(5):
        with written_whole(tmp_path / f"{number}.npz") as unfinished:
            unfinished.touch()
    assert listed == [tmp_path]


def test_the_cache_lies_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "t2i"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_cache() == Path("/home/somebody/.cache/t2i")


def test_who_has_no_home_is_told_so(monkeypatch):
    def no_home():
        raise RuntimeError

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        user_cache()


def by_hand(path: Path) -> None:
    path.write_bytes(bytes(200_000))


def by_torch(path: Path) -> None:
    import torch

    with path.open("wb") as file:
        torch.save(torch.zeros(50_000), file)


def by_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(50_000)}, path)


WRITERS = [by_hand, by_torch, by_safetensors]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_mode_is_what_the_umask_gives(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        with written_whole(tmp_path / "file") as unfinished:
            write(unfinished)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, write):
    """As a limit on the size of files: what is beyond it fails as on a full disk."""
    path = tmp_path / "file"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised, written_whole(path) as unfinished:
            write(unfinished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_read_only_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    """There nothing can be removed either, not even what is not there."""

    def refused(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="Read-only") as raised, written_whole(tmp_path / "file"):
        pass
    assert raised.value.filename == str(tmp_path / "file")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: refused(Path(dir, "tmpabc")))
    with pytest.raises(OSError, match="Read-only") as raised:
        check_writable(tmp_path / "file")
    assert raised.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("letter", ["n", "\u732b"])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, letter):
    longest = letter * (255 // len(letter.encode()))
    with written_whole(tmp_path / longest) as unfinished:
        unfinished.write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == [longest]
    too_long = tmp_path / (longest + letter)
    with pytest.raises(OSError, match="File name too long") as raised, written_whole(too_long):
        pass
    assert raised.value.filename == str(too_long)
    assert [path.name for path in tmp_path.iterdir()] == [longest]
