"""The members of a tar file that may be damaged."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from t2i.errors import DataError

BLOCK = tarfile.BLOCKSIZE
# Two blocks of zeros end an archive, which is then filled up to a whole record.
MAX_PADDING = 2 * BLOCK + tarfile.RECORDSIZE - BLOCK


@dataclass(frozen=True)
class Gap:
    """Bytes in which members should have been. cause: "damaged", or "truncated" for a file that was cut short: then
    the cut went through the member before, or came right after it."""

    cause: str
    size: int


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take up in a tar file."""
    return -(-size // BLOCK) * BLOCK


def members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo | Gap]:
    """The regular members of an uncompressed tar, and the gaps between them, in the order of the file. Blocks that are
    no headers are skipped, zeros among them (unless they end the file), until the next header. tarfile itself, and
    webdataset with it, takes either for the end of the archive. Raises DataError where there is no header at all."""
    length = os.fstat(file.fileno()).st_size
    end = found = 0
    too_long: tarfile.TarInfo | None = None  # a member that goes on behind the end of the file
    for member, stop in _headers(file, length):
        if member.offset > end or too_long is not None:
            yield Gap("damaged", member.offset - end)
        found += 1
        too_long = member if stop > length else None
        if too_long is None:
            end = stop
            if member.isreg():
                yield member
            elif member.type not in tarfile.SUPPORTED_TYPES and member.size:
                yield Gap("damaged", stop - member.offset)
    if too_long is not None:
        yield too_long
        yield Gap("truncated", length - too_long.offset)
    elif not found and length >= BLOCK and _has_data(file, 0, length):
        raise DataError(f"Shard {name} is not an uncompressed tar file.")
    elif length < end + BLOCK:
        yield Gap("truncated", length - end)
    elif _has_data(file, end, length):
        # The headers of the last members are lost, or the file's end as well.
        file.seek(length - BLOCK)
        yield Gap("truncated" if any(file.read()) else "damaged", length - end)
    elif length - end > MAX_PADDING:
        yield Gap("damaged", length - end)


def _headers(file: IO[bytes], length: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Whatever is a header at a multiple of BLOCK, and where the next one is expected. Behind a member that would go
    on after the end of the file, as its size is damaged or the file was cut, the search begins at its data."""
    # An empty archive; `fromtarfile` goes by its settings.
    archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(BLOCK)), encoding="utf-8")
    archive.fileobj = file
    position = 0
    while position + BLOCK <= length:
        file.seek(position)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
            if member.size < 0 or archive.offset <= position:
                raise tarfile.ReadError("negative size")
        except OSError:
            raise
        except Exception:  # tarfile raises nearly anything on extended headers that are not what they claim
            position += BLOCK
            continue
        stop = archive.offset
        yield member, stop
        position = stop if stop <= length else padded(member.offset_data)


def _has_data(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether any of these bytes is not zero."""
    file.seek(start)
    while start < stop and (block := file.read(min(stop - start, 1 << 20))):
        if block.strip(b"\0"):
            return True
        start += len(block)
    return False
