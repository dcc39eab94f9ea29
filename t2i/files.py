"""Files that are there whole or not at all, and where those of a user's cache lie."""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # what only writing can meet
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}  # of exFAT and others
SHORT_NAME = 50  # letters: with four bytes each, what is added still fits into the 255 bytes of a name
LEFT_AFTER_S = 24 * 3600  # what nobody wrote to for so long belongs to a process that was killed


def user_cache() -> Path:
    """$XDG_CACHE_HOME/t2i, ~/.cache/t2i where that is unset. Raises OSError for a user who has no home either."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "t2i"
    except RuntimeError as error:
        raise FileNotFoundError("There is no home folder; set XDG_CACHE_HOME.") from error


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` where it is not there. What it made of it and of those above goes again when the block ends with
    nothing in it."""
    made = list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()


@contextmanager
def written_whole(path: Path, is_new: bool = False) -> Iterator[Path]:
    """Another name beside `path`, to write to; what is written there becomes `path` when the block ends without an
    error, and is removed otherwise. Several processes may do so at once: the last one stays. The file's mode is the
    one that the umask gives. A full disk is an OSError that names `path`, whatever the library that met it raised.

    is_new: raise FileExistsError where `path` is there by then, and leave it alone
    """
    with made_folder(path.parent):
        _remove_left(path.parent)
        unfinished = path.with_name(f".{path.name[:SHORT_NAME]}.{uuid.uuid4().hex[:8]}.unfinished")
        try:
            unfinished.touch()
            mode = unfinished.stat().st_mode
            yield unfinished
            if unfinished.stat().st_mode != mode:  # safetensors puts a file of mode 0600 in its place
                unfinished.chmod(mode)
            if is_new:
                _move_to_new(unfinished, path)
            else:
                unfinished.replace(path)
        except Exception as error:
            system = system_error(error)
            if system is None or (system.errno not in NOT_WRITTEN and system.filename != str(unfinished)):
                raise
            raise OSError(system.errno, os.strerror(system.errno or 0), str(path)) from error
        finally:
            # Where nothing can be written, nothing can be removed, and the cause was another.
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Of a file that is open already the system does not say which one could not be written to."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _move_to_new(unfinished: Path, path: Path) -> None:
    try:
        os.link(unfinished, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with path.open("xb"):
            unfinished.replace(path)


@lru_cache(maxsize=1000)  # once in a process: a folder may hold hundreds of thousands of files
def _remove_left(folder: Path) -> None:
    for left in folder.glob(".*.unfinished"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                left.unlink()


def system_error(error: BaseException) -> OSError | None:
    """What the system said, of an error that a library raised in its place: torch raises a RuntimeError while it
    handles the OSError, safetensors writes the number into its message."""
    for each in (error, error.__cause__, error.__context__):
        if isinstance(each, OSError):
            return each
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
