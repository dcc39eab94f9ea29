"""What a tar shard holds and where, in webdataset's convention, as arrays that a small file beside it can keep.

A shard's headers are scanned once; samples are then read by offset, so any sample can be read at any time.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from t2i.data.captions import parse_metadata
from t2i.data.decode import BadSample, image_bytes, stored_size
from t2i.data.grouping import Samples
from t2i.data.members import PICTURE_ENDINGS, SAMPLE_ENDINGS, among, member
from t2i.data.tar import BLOCK, members
from t2i.errors import DataError

SUFFIX = ".index.npz"  # in the place of .tar
VERSION = 2  # 2: members of one key are one sample wherever they lie, links are followed
MAX_MEMBER_BYTES = 512 << 20  # more than any picture that is let through has
MAX_WASTE_BYTES = 64 << 10  # read and thrown away rather than read around
SETTLED_S = 2
MAX_SIDE_PX = 2**31 - 1
MAX_INDEX_BYTES = 2 << 30  # unpacked; grouping.MAX_PLACES takes most of that


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    keys: n strings, in the order in which they first come in the file
    extensions: E lower-cased extensions that occur in the shard
    offsets, sizes: (n, E) int64, in bytes; offset -1 where a sample lacks the extension
    flaws: row -> why the tar file itself lost (part of) this sample: "truncated" for the last one of a file that
        ends early, "damaged" next to headers that cannot be read, "duplicate" for a name that came before, "link" and
        "sparse" for a member that leads out of the tar or has holes. For samples that are lost without a trace, rows
        without members stand in at the end, so that each counts: as many as the bytes that are lost had room for.
    file_bytes: size of the tar file; another size says that the index is out of date
    original_px: (n, 2) int32 height and width of the source pictures, 0 where unknown; None: not looked at yet
    changed_ns: when the tar file was last changed, as `os.stat` says, which with its size tells whether it is still the
        one that was indexed; -1 where it may have changed again without a new time, or an older version wrote this
    linked: row * E + column of members that are links to another one, at whose place they are read, or that an extended
        header gave another name
    """

    keys: list[str]
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    flaws: Mapping[int, str]
    file_bytes: int
    original_px: np.ndarray | None = None
    linked: frozenset[int] = frozenset()
    changed_ns: int = -1

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def repeated(self) -> dict[int, int]:
        """Rows whose key an earlier sample has, too -> how many of these there are."""
        found: dict[int, int] = {}
        if len(set(self.keys)) < len(self.keys):
            seen: Counter[str] = Counter()
            for row, key in enumerate(self.keys):
                if seen[key]:
                    found[row] = seen[key]
                seen[key] += 1
        return found

    def read(self, file: int, row: int, endings: Sequence[str] | None = None) -> dict[str, bytes]:
        """The members of sample `row` by extension, from the open file descriptor `file`; of those meant by `endings`
        (see `members.among`) where that is given. One read, where a sample's members lie side by side. Each member's
        header is read with it and has to be the one that was indexed. Raises OSError."""
        wanted = sorted(
            (int(offset), int(size), extension)
            for extension, offset, size in zip(
                self.extensions, self.offsets[row], self.sizes[row], strict=True
            )
            if offset >= 0
        )
        if endings is not None:
            meant = among(tuple(extension for _, _, extension in wanted), tuple(endings))
            wanted = [each for each in wanted if each[2] in meant]
        found: dict[str, bytes] = {}
        start, data = 0, b""
        for i, (offset, size, extension) in enumerate(wanted):
            if size > MAX_MEMBER_BYTES:
                raise OSError(f"{self.keys[row]}.{extension} has {size} bytes, allowed: {MAX_MEMBER_BYTES}")
            if offset + size > start + len(data):
                start, stop = offset - BLOCK, offset + size
                for next_offset, next_size, _ in wanted[i + 1 :]:
                    if next_offset - stop > MAX_WASTE_BYTES or next_size > MAX_MEMBER_BYTES:
                        break
                    stop = max(stop, next_offset + next_size)
                if stop > self.file_bytes:  # a damaged header may say terabytes
                    raise OSError(f"it ends at byte {self.file_bytes}, before sample {self.keys[row]} does")
                data = os.pread(file, stop - start, start)
                if len(data) < stop - start:
                    raise OSError(f"it ends at byte {start + len(data)}, before sample {self.keys[row]} does")
            at = offset - start
            if not _is_header(data[at - BLOCK : at], self._name(row, extension), size):
                raise OSError(
                    f"{self.keys[row]}.{extension} is not at byte {offset}, where it was when this was indexed"
                )
            found[extension] = data[at : at + size]
        return found

    def picture_bytes(self, row: int) -> int | None:
        """Of the file of a sample's picture; None where it has none, and for row -1."""
        if row < 0:
            return None
        there = [
            e for e, offset in zip(self.extensions, self.offsets[row].tolist(), strict=True) if offset >= 0
        ]
        found = member(there, PICTURE_ENDINGS)
        return None if found is None else int(self.sizes[row, self.extensions.index(found)])

    def fits(self, file: int) -> bool:
        """Whether the open file `file` is, by its size and the first and last member, the one that was indexed.
        Raises OSError."""
        if os.fstat(file).st_size != self.file_bytes:
            return False
        with_members = np.flatnonzero((self.offsets >= 0).any(axis=1))
        for row in {int(with_members[0]), int(with_members[-1])} if len(with_members) else ():
            column = int(self.offsets[row].argmax())
            header = os.pread(file, BLOCK, int(self.offsets[row, column]) - BLOCK)
            if not _is_header(header, self._name(row, self.extensions[column]), int(self.sizes[row, column])):
                return False
        return True

    def _name(self, row: int, extension: str) -> str | None:
        """What the header of a member says; None where it has another name."""
        linked = self.linked and row * len(self.extensions) + self.extensions.index(extension) in self.linked
        return None if linked else f"{self.keys[row]}.{extension}"

    @classmethod
    def scan(cls, path: Path | str, descriptor: int | None = None) -> ShardIndex:
        """Reads the tar headers of `path`, or of the open file `descriptor`, of which `path` is but the name. Raises
        DataError where it is not a tar file, OSError where it cannot be read at all."""
        found = Samples(PurePath(path).name)
        with open(path if descriptor is None else descriptor, "rb", closefd=descriptor is None) as file:
            before = os.fstat(file.fileno())
            for member in members(file, str(path)):
                found.add(member)
            found.finish(members(file, str(path)))
            after = os.fstat(file.fileno())
        extensions, offsets, sizes, linked = found.arrays()
        unchanged = before.st_mtime_ns == after.st_mtime_ns and is_settled(after)
        return cls(
            found.keys,
            extensions,
            offsets,
            sizes,
            found.flaws,
            after.st_size,
            linked=linked,
            changed_ns=after.st_mtime_ns if unchanged else -1,
        )

    def with_sizes(self, path: Path | int) -> ShardIndex:
        """The same with `original_px`: by each sample's JSON, or else by the header of its picture.
        path: of the shard, or its open file"""
        if self.original_px is not None:
            return self
        found = np.zeros((len(self), 2), dtype=np.int32)
        with open(path, "rb", closefd=not isinstance(path, int)) as file:
            for row, key in enumerate(self.keys):
                try:
                    size = original_size(parse_metadata(self.read(file.fileno(), row, ("json",)), key))
                    found[row] = size or stored_size(
                        image_bytes(self.read(file.fileno(), row, SAMPLE_ENDINGS), key), key
                    )
                except (BadSample, OSError):
                    continue  # counted when it is read
        return replace(self, original_px=found)

    def to_bytes(self) -> bytes:
        """As an .npz file."""
        buffer = io.BytesIO()
        rows = sorted(self.flaws)
        arrays = {
            "version": np.array(VERSION),
            "samples": np.array(len(self)),
            "keys": _packed(self.keys),
            "extensions": _packed(self.extensions),
            "offsets": self.offsets,
            "sizes": self.sizes,
            "flaw_rows": np.array(rows, dtype=np.int64),
            "flaws": _packed([self.flaws[row] for row in rows]),
            "file_bytes": np.array(self.file_bytes),
            "linked": np.array(sorted(self.linked), dtype=np.int64),
            "changed_ns": np.array(self.changed_ns),
        }
        if self.original_px is not None:
            arrays["original_px"] = self.original_px
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Raises DataError where `data` is not what `to_bytes` makes."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                unpacked = sum(each.file_size for each in packed.infolist())
                if unpacked > MAX_INDEX_BYTES:
                    raise ValueError(f"{unpacked} bytes, allowed: {MAX_INDEX_BYTES}")
                arrays = {
                    each.filename.removesuffix(".npy"): _array(packed.read(each))
                    for each in packed.infolist()
                }
            if int(arrays["version"]) != VERSION:
                raise ValueError(f"version {arrays['version']}, allowed: {VERSION}")
            flaws = dict(zip(arrays["flaw_rows"].tolist(), _unpacked(arrays["flaws"]), strict=True))
            index = cls(
                _unpacked(arrays["keys"]),
                tuple(_unpacked(arrays["extensions"])),
                arrays["offsets"],
                arrays["sizes"],
                flaws,
                int(arrays["file_bytes"]),
                arrays.get("original_px"),
                frozenset(arrays["linked"].tolist()),
                int(arrays.get("changed_ns", -1)),
            )
            index._check()
        except Exception as error:  # zipfile and numpy raise nearly anything on untrusted bytes
            raise DataError(f"{name} is not an index: {error}; `t2i data index` writes it anew.") from error
        return index

    def _check(self) -> None:
        """Raises ValueError where the arrays do not belong together."""
        rows, columns = len(self.keys), len(self.extensions)
        for name, array, shape in (
            ("offsets", self.offsets, (rows, columns)),
            ("sizes", self.sizes, (rows, columns)),
            ("original_px", self.original_px, (rows, 2)),
        ):
            if array is not None and (array.shape != shape or array.dtype.kind != "i"):
                raise ValueError(f"{name} of {array.dtype} {array.shape}, not integers {shape}")
        there = self.offsets >= 0
        if (self.offsets[there] < BLOCK).any() or (self.sizes < 0).any():
            raise ValueError("members before the first header")
        if not all(0 <= row < rows for row in self.flaws):
            raise ValueError(f"flaws of rows {sorted(self.flaws)} among {rows}")


def is_settled(found: os.stat_result) -> bool:
    """Whether a file that changes from now on gets another time of change; some systems give that in whole seconds."""
    return time.time() - found.st_mtime >= SETTLED_S


def original_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the source picture, where the sample's JSON says so."""
    height, width = metadata.get("original_height"), metadata.get("original_width")
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
        return (height, width) if max(height, width) <= MAX_SIDE_PX else None
    return None


def _is_header(block: bytes, name: str | None, size: int) -> bool:
    """Whether `block` is the tar header of this member: by its size, and by its name where that is sure to stand in the
    header (all of it, or what follows the prefix). Not by the checksum, which would take as long as reading does."""
    try:
        if len(block) < BLOCK or tarfile.nti(block[124:136]) != size:  # type: ignore[attr-defined]
            return False
    except tarfile.TarError:
        return False
    found = block[:100].partition(b"\0")[0].lower()
    sure = name is not None and len(name) <= 100 and name.isascii()
    return name is None or not sure or (found != b"" and name.lower().encode().endswith(found))


def _array(data: bytes) -> np.ndarray:
    """As `np.load` without pickle, which takes three times as long for arrays as small as these. Raises ValueError."""
    begin = 10 + int.from_bytes(data[8:10], "little")
    shape, fortran, dtype = _array_header(data[:begin])
    return np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=1024)
def _array_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    if data[:8] != np.lib.format.magic(1, 0):
        raise ValueError("an array that is not in numpy's format 1.0")
    return np.lib.format.read_array_header_1_0(io.BytesIO(data[8:]))


def _packed(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _unpacked(data: np.ndarray) -> list[str]:
    text = data.tobytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []
