"""Files that are there whole or not at all."""

from __future__ import annotations

import glob
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEFT_AFTER_S = 24 * 3600  # what nobody wrote to for so long belongs to a process that was killed


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
