"""Files that are there whole or not at all, and where those of a user's cache lie."""

from __future__ import annotations

import glob
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEFT_AFTER_S = 24 * 3600  # what nobody wrote to for so long belongs to a process that was killed


def user_cache() -> Path:
    """$XDG_CACHE_HOME/t2i, ~/.cache/t2i where that is unset. Raises OSError for a user who has no home either."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "t2i"
    except RuntimeError as error:
        raise FileNotFoundError("There is no home folder; set XDG_CACHE_HOME.") from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Another name beside `path`, to write to; what is written there becomes `path` when the block ends without an
    error, and is removed otherwise. Several processes may do so at once: the last one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER_S:
                left.unlink()
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
