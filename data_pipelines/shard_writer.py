"""Captioned pictures to tar shards in the layout of img2dataset and LAION.

A shard `00000.tar` holds `<key>.png` (or jpg, webp), `<key>.txt` and `<key>.json` for each sample; the key is
the shard's number (5 digits) and the sample's place in it (4 digits).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from t2i.errors import DataError

MAX_SAMPLES_PER_SHARD = 10_000  # the key has four digits for the place in the shard


@dataclass(frozen=True)
class Sample:
    """One captioned picture, encoded.

    image: the file's bytes, in the format that `extension` names
    width, height: pixels of `image`
    original_width, original_height: pixels of the source picture, before any resizing
    columns: further entries of the sample's JSON
    """

    image: bytes
    extension: Literal["jpg", "png", "webp"]
    caption: str
    width: int
    height: int
    original_width: int
    original_height: int
    url: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def png_sample(picture: Image.Image, caption: str, columns: Mapping[str, Any]) -> Sample:
    """A lossless sample of a picture that was not resized."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    width, height = picture.size
    return Sample(buffer.getvalue(), "png", caption, width, height, width, height, columns=columns)


def write_shards(samples: Iterable[Sample], directory: Path, samples_per_shard: int = 1000) -> list[Path]:
    """Writes `directory`/00000.tar, 00001.tar, ... and returns their paths.

    The same samples give the same bytes. A shard gets its name only when it is complete. Raises DataError
    where `samples_per_shard` does not fit the key, or the directory already holds shards.
    """
    check_samples_per_shard(samples_per_shard)
    if any(directory.glob("*.tar")):
        raise DataError(f"{directory} already holds shards; remove them or name another directory.")
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    iterator = iter(samples)
    while shard := list(itertools.islice(iterator, samples_per_shard)):
        path = directory / f"{len(paths):05d}.tar"
        write_shard(enumerate(shard), path, len(paths))
        paths.append(path)
    return paths


def check_samples_per_shard(samples_per_shard: int) -> None:
    """Raises DataError where that many do not fit the key."""
    if not 1 <= samples_per_shard <= MAX_SAMPLES_PER_SHARD:
        allowed = f"1 to {MAX_SAMPLES_PER_SHARD}"
        raise DataError(f"samples_per_shard is {samples_per_shard}; allowed: {allowed}.")


def write_shard(samples: Iterable[tuple[int, Sample]], path: Path, shard: int) -> None:
    """Writes one tar of (place, sample), keyed by `shard` and place. It gets its name when it is complete."""
    unfinished = path.with_suffix(".tar.unfinished")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in samples:
            _add_sample(tar, f"{shard:05d}{index:04d}", sample)
    os.replace(unfinished, path)


@contextlib.contextmanager
def complete_directory(directory: Path) -> Iterator[Path]:
    """A temporary directory that becomes `directory` when the block ends without an error.

    Where several processes build the same data set at once, the first to finish wins and the others' work is
    thrown away. Raises DataError where `directory` exists and is not empty.
    """
    if directory.exists() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty; remove it or name another directory.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        yield unfinished
        try:
            unfinished.rename(directory)
        except OSError:
            if not (directory.is_dir() and any(directory.iterdir())):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _add_sample(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    description = {
        "caption": sample.caption,
        "url": sample.url,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": sample.width,
        "height": sample.height,
        "original_width": sample.original_width,
        "original_height": sample.original_height,
        "sha256": hashlib.sha256(sample.image).hexdigest(),
    }
    if clash := description.keys() & sample.columns.keys():
        raise ValueError(f"columns may not replace {sorted(clash)}")
    members = {
        sample.extension: sample.image,
        "txt": sample.caption.encode(),
        "json": json.dumps({**description, **sample.columns}, ensure_ascii=False).encode(),
    }
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")  # mtime, owner and group are 0 unless set
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
