"""Shards that are compressed as a whole (`.tar.gz`, `.tgz`, ...), which webdataset reads, too: they are unpacked to
plain tar files, because only in these a sample can be read by its offset."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from t2i.errors import DataError

# By what their files begin with: the content decides, not the name.
OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b\x08": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
UNREAD = {
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}
MAGIC_BYTES = 6
MAX_UNPACKED_GIB = 50.0  # a few MB can stand for more than any disk holds
BLOCK = 8 << 20


def is_compressed(file: IO[bytes], name: str) -> bool:
    """Whether the open `file` has to be unpacked; it is rewound. Raises DataError for what is not read."""
    file.seek(0)
    begin = file.read(MAGIC_BYTES)
    file.seek(0)
    for magic, kind in UNREAD.items():
        if begin.startswith(magic):
            raise DataError(
                f"Shard {name} is a {kind} file; allowed: tar, alone or compressed by gzip, bzip2 or xz."
            )
    return any(begin.startswith(magic) for magic in OPENERS)


def unpack(file: IO[bytes], name: str, target: Path, max_bytes: int | None = None) -> None:
    """Writes the tar that is compressed in `file` to `target`. Where the stream ends early or is damaged, what came
    before: a tar that is cut short, whose losses are then counted. Raises DataError where it holds more than
    `max_bytes`, OSError where the disk takes no more."""
    begin = file.read(MAGIC_BYTES)
    file.seek(0)
    opener = next(opener for magic, opener in OPENERS.items() if begin.startswith(magic))
    done = 0
    with target.open("wb") as part, opener(file) as stream:
        while True:
            try:
                block = stream.read1(BLOCK)
            except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError):
                return
            except OSError as error:
                if error.errno is None:  # bz2's "Invalid data stream"
                    return
                raise
            if not block:
                return
            done += len(block)
            if max_bytes is not None and done > max_bytes:
                raise DataError(
                    f"Shard {name} unpacks to more than the {max_bytes} bytes that data.shard_cache_gib allows."
                )
            part.write(block)
