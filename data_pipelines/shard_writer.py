"""Captioned pictures to tar shards in the layout of img2dataset and LAION.

A shard `00000.tar` holds `<key>.png` (or jpg, webp), `<key>.txt` and `<key>.json` for each sample; the key is
the shard's number (5 digits) and the sample's place in it (4 digits). Beside it `00000.parquet` has a row for each
place, those that failed included.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from t2i.errors import DataError
from t2i.few import plural
from t2i.files import written_whole

from .optional import arrow_file, need

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SAMPLES_PER_SHARD = 10_000  # the key has four digits for the place in the shard
# Fields of a sample's JSON and columns of the shard's table, named, ordered and typed as img2dataset's.
LAYOUT = {
    "caption": "string",
    "url": "string",
    "key": "string",
    "status": "string",
    "error_message": "string",
    "width": "int32",
    "height": "int32",
    "original_width": "int32",
    "original_height": "int32",
    "exif": "string",
    "sha256": "string",
}


@dataclass(frozen=True)
class Sample:
    """One captioned picture, encoded.

    image: the file's bytes, in the format that `extension` names
    caption: None where the source has none; the `.txt` is then empty
    width, height: pixels of `image`
    original_width, original_height: pixels of the source picture, before any resizing
    columns: further entries of the sample's JSON
    exif: the source picture's tags, a JSON object as text; None: not looked at
    sha256: of the source picture's file; None: of `image`
    """

    image: bytes
    extension: Literal["jpg", "png", "webp"]
    caption: str | None
    width: int
    height: int
    original_width: int
    original_height: int
    url: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    exif: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Failure:
    """What stands in a shard's table, and not in its tar, for a row that gave no sample.

    status: "failed_to_download" or "failed_to_resize" as img2dataset has it, "failed" for other sources
    error_message: the cause, ": " and what happened
    """

    status: str
    error_message: str
    caption: str | None
    url: str | None = None


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


def check_no_more(out: Path, shards: int, source: str) -> None:
    """Raises DataError where the folder `out` has more shards than those that `source` fills."""
    for path in sorted(out.glob("[0-9]" * 5 + ".tar")):
        if int(path.stem) >= shards:
            raise DataError(
                f"{path} is not of {source}, which fill {plural(shards, 'shard')}; name another folder."
            )


def stats_of(shard: Path, digest: str, otherwise: str) -> dict[str, Any]:
    """The statistics beside a shard that is there. Raises DataError, which says `otherwise`, where its "rows" are not
    `digest`: where it was made of something else."""
    try:
        stats: dict[str, Any] = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_text())
        same = stats["rows"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise DataError(f"{shard} {otherwise}; remove it, or name another folder.")
    return stats


def write_shard(samples: Iterable[tuple[int, Sample]], path: Path, shard: int) -> None:
    """Writes one tar of (place, sample), keyed by `shard` and place. path: one of `whole_shard`, or in a folder of
    `complete_directory`"""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, sample in samples:
            _add_sample(tar, sample_key(shard, index), sample)


@contextlib.contextmanager
def whole_shard(path: Path, with_table: bool = True) -> Iterator[tuple[Path, Path, Path]]:
    """Other names for the tar `path`, its `_stats.json` and its `.parquet`, which get their own when the block ends
    without an error, the tar last: a shard that is there is complete. Otherwise none of them stays."""
    with contextlib.ExitStack() as stack:
        tar = stack.enter_context(written_whole(path))
        stats = stack.enter_context(written_whole(path.with_name(f"{path.stem}_stats.json")))
        table = path.with_suffix(".parquet")
        yield tar, stats, stack.enter_context(written_whole(table)) if with_table else table


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


def free_names(names: Iterable[str]) -> dict[str, str]:
    """What columns of a source are called beside LAYOUT's, which no column may hide: `WIDTH` -> `table_WIDTH`.
    Case does not count, as it does not in SQL."""
    return {name: f"table_{name}" if name.lower() in LAYOUT else name for name in names}


def write_table(outcomes: Sequence[Sample | Failure], columns: pa.Table, path: Path, shard: int) -> None:
    """Writes the parquet beside shard number `shard`: the n `columns` of the source and LAYOUT's, a row for each
    place. path: as in `write_shard`. Raises ConfigError where pyarrow is not installed."""
    pa, parquet = need("pyarrow", "data"), need("pyarrow.parquet", "data")
    rows = [_described(outcome, sample_key(shard, place)) for place, outcome in enumerate(outcomes)]
    fields = [pa.field(name, pa.type_for_alias(kind)) for name, kind in LAYOUT.items()]
    arrays = [pa.array([row[field.name] for row in rows], field.type) for field in fields]
    table = pa.Table.from_arrays([*columns.columns, *arrays], schema=pa.schema([*columns.schema, *fields]))
    with arrow_file(path, "wb") as file:
        parquet.write_table(table, file)


def sample_key(shard: int, place: int) -> str:
    return f"{shard:05d}{place:04d}"


def _described(outcome: Sample | Failure, key: str) -> dict[str, Any]:
    """The fields of LAYOUT."""
    known: dict[str, Any] = dict.fromkeys(LAYOUT)
    known |= {"caption": outcome.caption, "url": outcome.url, "key": key}
    if isinstance(outcome, Failure):
        return known | {"status": outcome.status, "error_message": outcome.error_message}
    return known | {
        "status": "success",
        "width": outcome.width,
        "height": outcome.height,
        "original_width": outcome.original_width,
        "original_height": outcome.original_height,
        "exif": outcome.exif,
        "sha256": outcome.sha256 or hashlib.sha256(outcome.image).hexdigest(),
    }


def _add_sample(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    if clash := LAYOUT.keys() & sample.columns.keys():
        raise ValueError(f"columns may not replace {sorted(clash)}")
    description = {**_described(sample, key), **sample.columns}
    members = {
        sample.extension: sample.image,
        "txt": (sample.caption or "").encode(),
        "json": json.dumps(description, ensure_ascii=False).encode(),
    }
    for extension, content in members.items():
        info = tarfile.TarInfo(f"{key}.{extension}")  # mtime, owner and group are 0 unless set
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
