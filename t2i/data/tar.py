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
    """Bytes in which members should have been and are not. cause: "damaged", or "truncated" for a file that was cut
    short: then the cut went through the member before, or came right after it, or after these bytes.

    cut: bytes seem to have been cut out here, nobody knows how many: `size` is the least"""

    cause: str
    size: int
    cut: bool = False


def padded(size: int) -> int:
    """Bytes that `size` bytes of data take up in a tar file."""
    return -(-size // BLOCK) * BLOCK


def members(file: IO[bytes], name: str) -> Iterator[tarfile.TarInfo | Gap]:
    """The regular members of an uncompressed tar, its links, and the gaps between them, in the order of the file.
    Blocks that are no headers are skipped, zeros among them (unless they end the file), until the next header. tarfile
    itself, and webdataset with it, takes either for the end of the archive. Raises DataError where there is no header
    at all."""
    length = os.fstat(file.fileno()).st_size
    end = found = 0
    too_long: tarfile.TarInfo | None = None  # a member that goes on behind the end of the file
    for member, stop in _headers(file, length):
        if member.offset > end or too_long is not None:
            joined = _is_joint(file, end, member.offset)
            yield Gap("damaged", BLOCK if joined else member.offset - end)
        found += 1
        too_long = member if stop > length else None
        if too_long is None:
            end = stop
            if member.isreg() or member.islnk() or member.issym():
                yield member
                if _is_cut(file, member, stop):
                    yield Gap("damaged", BLOCK, cut=True)
            elif member.type not in tarfile.SUPPORTED_TYPES and member.size:
                yield Gap("damaged", stop - member.offset)
    if too_long is not None:
        yield too_long
        yield Gap("truncated", 0)
        return
    data_end = _data_end(file, end, length)
    if not found and length >= BLOCK and data_end:
        raise DataError(f"Shard {name} is not an uncompressed tar file.")
    if length < end + BLOCK:
        yield Gap("truncated", 0)
    elif data_end > end:
        # The headers of the last members are lost, or the file's end as well.
        # Nothing follows that would say that this is all.
        yield Gap("damaged" if data_end <= length - BLOCK else "truncated", data_end - end, cut=True)
    elif length - end > MAX_PADDING:
        yield Gap("damaged", BLOCK if _is_padded(end, length) else length - end)
    elif _is_short(end, length):
        yield Gap("damaged", BLOCK, cut=True)


def _is_cut(file: IO[bytes], member: tarfile.TarInfo, stop: int) -> bool:
    """Whether something stands between the end of a member's data and the end of its last block, where writers put
    zeros: the rest of another member, of which the beginning is missing."""
    end = member.offset_data + member.size
    if end == stop or not member.isreg() or member.issparse():
        return False
    file.seek(end)
    return file.read(stop - end).strip(b"\0") != b""


def _is_short(end: int, length: int) -> bool:
    """Whether the zeros from `end` on filled up a record, which is no longer whole: bytes before them are missing."""
    filled = length - end > 2 * BLOCK
    return filled and length % tarfile.RECORDSIZE != 0 and not _is_padded(end, length)


def _is_joint(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether this may be the end of an archive, to which another one was appended (`cat a.tar b.tar`)."""
    fits = 2 * BLOCK <= stop - start <= MAX_PADDING and stop % tarfile.RECORDSIZE == 0
    return fits and _data_end(file, start, stop) == start


def _is_padded(end: int, length: int) -> bool:
    """Whether zeros up to `length` may fill up a record of another size than usual (`tar --blocking-factor`)."""
    records = (1 << shift for shift in range(10, 23))  # 1 KiB to 4 MiB
    return any(length % record == 0 and length - end < 2 * BLOCK + record for record in records)


def _headers(file: IO[bytes], length: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Whatever is a header at a multiple of BLOCK, and where the next one is expected. Behind a member that would go
    on after the end of the file, as its size is damaged or the file was cut, the search begins at its data."""
    # An empty archive; `fromtarfile` goes by its settings.
    archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(BLOCK)), encoding="utf-8")
    archive.fileobj = file
    position = 0
    while position + BLOCK <= length:
        file.seek(position)
        # Global extended headers say something of every member that follows.
        plain = None if archive.pax_headers else plain_member(file.read(BLOCK), position)
        if plain is not None:
            stop = plain.offset_data + padded(plain.size)
            yield plain, stop
            position = stop if stop <= length else plain.offset_data
            continue
        file.seek(position)
        try:
            member = tarfile.TarInfo.fromtarfile(archive)
            if member.size < 0 or archive.offset <= position:
                raise tarfile.ReadError("negative size")
        except OSError:
            raise
        except Exception:  # tarfile raises nearly anything on extended headers that are not what they claim
            position = _behind_zeros(file, position + BLOCK, length)
            continue
        stop = archive.offset
        yield member, stop
        position = stop if stop <= length else padded(member.offset_data)


def _behind_zeros(file: IO[bytes], start: int, stop: int) -> int:
    """The first block from `start` on that is not zero: an unpacked file may have gigabytes of them."""
    file.seek(start)
    size = BLOCK
    while start < stop:
        data = file.read(min(size, stop - start))
        rest = data.lstrip(b"\0")
        if rest or not data:
            return start + (len(data) - len(rest)) // BLOCK * BLOCK
        start, size = start + len(data), 1 << 20
    return start


def plain_member(header: bytes, offset: int) -> tarfile.TarInfo | None:
    """What tarfile makes of the commonest of headers, in a fraction of its time: that of a regular file with a short
    name and digits for a size. None for any other, which tarfile has to judge. Mode, owner and time, for which tarfile
    may refuse a header, are not looked at.

    header: (BLOCK,) bytes; offset: where they stand in the file
    """
    size, checksum = header[124:136].rstrip(b" \0"), header[148:156].rstrip(b" \0")
    if header[156:157] != tarfile.REGTYPE or not size.isdigit() or not checksum.isdigit() or header[345]:
        return None
    try:
        member = tarfile.TarInfo(header[:100].partition(b"\0")[0].decode("utf-8"))
        member.size, wanted = int(size, 8), int(checksum, 8)
    except ValueError:
        return None
    # The checksum counts itself as eight spaces.
    if sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * ord(" ") != wanted:
        return None
    member.offset, member.offset_data = offset, offset + BLOCK
    return member


def _data_end(file: IO[bytes], start: int, stop: int) -> int:
    """Behind the last byte from `start` on that is not zero; `start` where all are."""
    file.seek(start)
    end = start
    while start < stop and (block := file.read(min(stop - start, 1 << 20))):
        if data := block.rstrip(b"\0"):
            end = start + len(data)
        start += len(block)
    return end
