"""What a tar shard holds and where, in webdataset's convention, as arrays that a small file beside it can keep.

A shard's headers are scanned once; samples are then read by offset, so any sample can be read at any time.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from webdataset.tariterators import base_plus_ext

from t2i.data.captions import parse_metadata
from t2i.data.decode import BadSample, image_bytes, stored_size
from t2i.errors import DataError

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own bookkeeping, never part of a sample
SUFFIX = ".index.npz"  # in the place of .tar
VERSION = 1
T = TypeVar("T", bound=Mapping[str, object])


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    keys: n strings, in the order of the file
    extensions: E lower-cased extensions that occur in the shard
    offsets, sizes: (n, E) int64, in bytes; offset -1 where a sample lacks the extension
    flaws: row -> why the tar file itself lost (part of) this sample: "truncated" for the last one of a file that
        ends early, "damaged" next to headers that cannot be read, "duplicate" for a name that came before. Where a
        flaw left no sample to blame, a row without members stands in, so that each loss counts.
    file_bytes: size of the tar file; another size says that the index is out of date
    original_px: (n, 2) int32 height and width of the source pictures, 0 where unknown; None: not looked at yet
    """

    keys: list[str]
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    flaws: Mapping[int, str]
    file_bytes: int
    original_px: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, file: int, row: int, extensions: Sequence[str] | None = None) -> dict[str, bytes]:
        """The members of sample `row` by extension, from the open file descriptor `file`; of those in `extensions`
        where that is given. One read, as a sample's members lie side by side. Raises OSError."""
        wanted = [
            (extension, int(offset), int(size))
            for extension, offset, size in zip(
                self.extensions, self.offsets[row], self.sizes[row], strict=True
            )
            if offset >= 0 and (extensions is None or extension in extensions)
        ]
        if not wanted:
            return {}
        start = min(offset for _, offset, _ in wanted)
        stop = max(offset + size for _, offset, size in wanted)
        if stop > self.file_bytes:  # a damaged header may say terabytes
            raise OSError(f"it ends at byte {self.file_bytes}, before sample {self.keys[row]} does")
        data = os.pread(file, stop - start, start)
        if len(data) < stop - start:
            raise OSError(f"it ends at byte {start + len(data)}, before sample {self.keys[row]} does")
        return {extension: data[o - start : o - start + size] for extension, o, size in wanted}

    @classmethod
    def scan(cls, path: Path) -> ShardIndex:
        """Reads the tar headers of `path`. Raises DataError where it is not a tar file, OSError where it cannot
        be read at all."""
        rows: list[tuple[str, dict[str, tuple[int, int]]]] = []
        flaws: dict[int, str] = {}
        gap = False  # since the last member
        for member in _tar_members(path):
            if isinstance(member, str):
                if member == "truncated":
                    if not rows:
                        rows.append((path.name, {}))
                    flaws[len(rows) - 1] = member
                gap = member == "damaged"
                continue
            key, extension = base_plus_ext(member.name)
            if key is None or META_MEMBER.match(member.name):
                continue
            extension = extension.lower()
            if not rows or rows[-1][0] != key:
                if gap:  # whole samples may have stood between these two
                    flaws[len(rows)] = "damaged"
                    rows.append((f"{path.name} before {key}", {}))
                rows.append((key, {}))
            elif extension in rows[-1][1]:
                flaws[len(rows)] = "duplicate"
                rows.append((key, {}))
            gap = False
            rows[-1][1][extension] = (member.offset_data, member.size)
        if gap:
            flaws[len(rows)] = "damaged"
            rows.append((f"{path.name} at its end", {}))
        rows, flaws = _without_doubles(rows, flaws)
        extensions = tuple(sorted({extension for _, found in rows for extension in found}))
        places = np.full((len(rows), len(extensions), 2), (-1, 0), dtype=np.int64)
        for row, (_, found) in enumerate(rows):
            for column, extension in enumerate(extensions):
                places[row, column] = found.get(extension, (-1, 0))
        keys = [key for key, _ in rows]
        return cls(keys, extensions, places[..., 0].copy(), places[..., 1].copy(), flaws, path.stat().st_size)

    def with_sizes(self, path: Path) -> ShardIndex:
        """The same with `original_px`: by each sample's JSON, or else by the header of its picture."""
        if self.original_px is not None:
            return self
        found = np.zeros((len(self), 2), dtype=np.int32)
        with path.open("rb") as file:
            for row, key in enumerate(self.keys):
                try:
                    size = original_size(parse_metadata(self.read(file.fileno(), row, ("json",)), key))
                    found[row] = size or stored_size(image_bytes(self.read(file.fileno(), row), key), key)
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
        }
        if self.original_px is not None:
            arrays["original_px"] = self.original_px
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> ShardIndex:
        """Raises DataError where `data` is not what `to_bytes` makes."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
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
                )
            shape = (len(index.keys), len(index.extensions))
            if index.offsets.shape != shape or index.sizes.shape != shape:
                raise ValueError(f"offsets of {index.offsets.shape} for {shape} members")
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{name} is not an index: {error}; `t2i data index` writes it anew.") from error
        return index


def original_size(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the source picture, where the sample's JSON says so."""
    height, width = metadata.get("original_height"), metadata.get("original_width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return None


def _packed(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _unpacked(data: np.ndarray) -> list[str]:
    text = data.tobytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []


def _without_doubles(
    rows: list[tuple[str, T]], flaws: dict[int, str]
) -> tuple[list[tuple[str, T]], dict[int, str]]:
    """Without the stand-ins for damage whose neighbours lack a member that most samples have: these count already
    where that member matters, and nothing else need be missing."""
    counts = Counter(extension for _, found in rows for extension in found)
    usual = {extension for extension, count in counts.items() if 2 * count > len(rows)}

    def blamed(row: int) -> bool:
        near = [rows[i][1] for i in (row - 1, row + 1) if 0 <= i < len(rows) and rows[i][1]]
        return flaws.get(row) == "damaged" and any(usual - found.keys() for found in near)

    kept = [row for row in range(len(rows)) if not blamed(row)]
    return [rows[row] for row in kept], {new: flaws[old] for new, old in enumerate(kept) if old in flaws}


def _tar_members(path: Path) -> Iterator[tarfile.TarInfo | str]:
    """The regular members of an uncompressed tar; between them "damaged" where blocks were skipped that are no
    headers, and at the end "truncated" where the file was cut short, after the member that the cut went through.
    tarfile itself, and webdataset with it, takes either for the end of the archive in most cases."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        end = found = 0
        # ignore_zeros: goes on behind blocks that are no headers, at the next one that is.
        archive = tarfile.TarFile(fileobj=file, ignore_zeros=True) if length >= tarfile.BLOCKSIZE else None
        while archive is not None and end <= length:
            try:
                member = archive.next()
            except tarfile.TarError:  # a header that announces another, which is not there
                member = None
            if member is None or member.size < 0:
                break
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every one
            if _has_data(file, end, member.offset):
                yield "damaged"
            found += 1
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.isreg():
                yield member
        if not found and length >= tarfile.BLOCKSIZE and _has_data(file, 0, length):
            raise DataError(f"Shard {path} is not an uncompressed tar file.")
        if length < end + tarfile.BLOCKSIZE:
            yield "truncated"
        elif _has_data(
            file, end, length
        ):  # the headers of the last members are lost, or the file's end as well
            file.seek(length - tarfile.BLOCKSIZE)
            yield "truncated" if any(file.read()) else "damaged"


def _has_data(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether any of these bytes is not zero."""
    file.seek(start)
    while start < stop and (block := file.read(min(stop - start, 1 << 20))):
        if block.strip(b"\0"):
            return True
        start += len(block)
    return False
