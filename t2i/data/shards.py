"""Tar shards, in webdataset's convention, as an index: which samples there are and where their bytes lie.

A shard's headers are scanned once; samples are then read by offset, so any sample can be read at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from t2i.errors import DataError

META_MEMBER = re.compile(r"__[^/]*__($|/)")  # webdataset's own bookkeeping, never part of a sample
ZERO_BLOCK = bytes(tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    path: the local file
    keys: n strings, in the order of the file
    extensions: E lower-cased extensions that occur in the shard
    offsets, sizes: (n, E) int64, in bytes; offset -1 where a sample lacks the extension
    truncated: the file ends early. Then its last sample (a stand-in named after the file, where not one is
        left) may lack members without a trace, so that reading it counts as bad.
    """

    path: Path
    keys: list[str]
    extensions: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    truncated: bool

    def __len__(self) -> int:
        return len(self.keys)

    def cut_short(self, row: int) -> bool:
        """True for the sample at which a truncated file ends."""
        return self.truncated and row == len(self) - 1

    def read(self, row: int, extensions: Sequence[str] | None = None) -> dict[str, bytes]:
        """The members of sample `row`, by extension; of those in `extensions` where that is given.
        Raises DataError."""
        members = {}
        try:
            with self.path.open("rb") as file:
                for column, extension in enumerate(self.extensions):
                    offset, size = int(self.offsets[row, column]), int(self.sizes[row, column])
                    if offset >= 0 and (extensions is None or extension in extensions):
                        members[extension] = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise DataError(f"Shard {self.path} cannot be read any more: {error}.") from error
        return members

    @classmethod
    def scan(cls, path: Path) -> ShardIndex:
        """Reads the tar headers of `path`. Raises DataError where it is not a tar file."""
        samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        members, truncated = _tar_members(path)
        for member in members:
            key, extension = base_plus_ext(member.name)
            if key is None or META_MEMBER.match(member.name):
                continue
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            extension = extension.lower()
            if extension in samples[-1][1]:
                raise DataError(
                    f"Shard {path} holds {member.name} twice; names within a shard must be unique."
                )
            samples[-1][1][extension] = (member.offset_data, member.size)
        if truncated and not samples:
            samples.append((path.name, {}))
        extensions = tuple(sorted({extension for _, found in samples for extension in found}))
        places = np.full((len(samples), len(extensions), 2), (-1, 0), dtype=np.int64)
        for row, (_, found) in enumerate(samples):
            for column, extension in enumerate(extensions):
                places[row, column] = found.get(extension, (-1, 0))
        keys = [key for key, _ in samples]
        return cls(path, keys, extensions, places[..., 0].copy(), places[..., 1].copy(), truncated)


def _tar_members(path: Path) -> tuple[list[tarfile.TarInfo], bool]:
    """The regular members of an uncompressed tar, and whether it was cut short: tarfile itself, and
    webdataset with it, takes the end of the file for the end of the archive in most such cases."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < tarfile.BLOCKSIZE:
            return [], True
        members: list[tarfile.TarInfo] = []
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                try:
                    for member in archive:
                        if member.isreg():
                            members.append(member)
                except tarfile.ReadError:
                    return members, True
                file.seek(archive.offset)
                return members, file.read(tarfile.BLOCKSIZE) != ZERO_BLOCK
        except tarfile.TarError as error:
            raise DataError(f"Shard {path} is not an uncompressed tar file: {error}.") from error


def expand(shards: str | Sequence[str], key: str = "data.shards") -> list[str]:
    """Paths and URLs with webdataset's brace expansion (`{00000..00009}.tar`, `a.tar::b.tar`).
    key: the configuration key that DataError names."""
    try:
        expanded = [
            url for text in ([shards] if isinstance(shards, str) else shards) for url in expand_urls(text)
        ]
    except (AssertionError, ValueError) as error:
        raise DataError(f"{key} {shards!r} cannot be expanded: {error}.") from error
    if not expanded:
        raise DataError(f"{key} is {shards!r}; allowed: at least one path or URL.")
    return expanded


def open_shards(shards: str | Sequence[str], key: str = "data.shards") -> list[ShardIndex]:
    """Indexes of all shards that a configuration names, in its order. Raises DataError."""
    return list(_open_each(expand(shards, key), key))


def _open_each(urls: Sequence[str], key: str) -> Iterator[ShardIndex]:
    for url in urls:
        path = local_path(url, key)
        if not path.is_file():
            raise DataError(f"{key} names {url}, which does not exist.")
        try:
            yield ShardIndex.scan(path)
        except OSError as error:
            raise DataError(f"{key} names {url}, which cannot be read: {error}.") from error


def cache_folder() -> Path:
    """Where shards behind URLs are copied to: $XDG_CACHE_HOME/t2i/shards, ~/.cache where that is unset."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2i" / "shards"


def local_path(url: str, key: str = "data.shards") -> Path:
    """The local file of a shard; one behind http(s) is copied into the cache the first time."""
    scheme = urlparse(url).scheme
    if scheme == "":
        return Path(url).expanduser()
    if scheme == "file":
        return Path(url2pathname(urlparse(url).path))
    if scheme not in ("http", "https"):  # webdataset would run `pipe:` in a shell
        raise DataError(f"{key} names {url}; allowed: a path, or a file:, http: or https: URL.")
    name = Path(urlparse(url).path).name or "shard.tar"
    path = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not path.exists():
        _download(url, path, key)
    return path


def _download(url: str, path: Path, key: str) -> None:
    """Copies `url` to `path` so that `path` is there whole or not at all; the processes of one machine
    wait for the first of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        part = path.with_suffix(".part")
        try:
            with gopen(url) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except OSError as error:
            raise DataError(f"{key} names {url}, which cannot be fetched: {error}.") from error
        part.replace(path)
