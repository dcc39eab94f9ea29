"""Sets of pictures to be measured: a folder of files, the samples of shards, or what a model draws."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i.data.decode import BadSample, decode_image, open_image, resize_and_crop, stored_size
from t2i.data.fingerprint import contents
from t2i.data.members import PICTURE_ENDINGS, READ
from t2i.data.reader import SampleReader, Wanted, causes
from t2i.data.sources import expand, is_local
from t2i.data_config import DataConfig
from t2i.errors import DataError

RECIPE_KEY = "t2i"  # of a PNG's text, where `t2i sample` writes the prompt
INPUTS = "inputs"  # the folder where `t2i serve` keeps what clients sent


@dataclass(frozen=True)
class Item:
    """picture: (3, H, W) uint8; caption: "" where none is known; metadata: the sample's JSON"""

    picture: Tensor
    caption: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """read: the pictures in their order, all of `size_px` (H, W); count: how many there may be; name: for people;
    fingerprint: of what they are made from; bad: those that the last reading left out, by cause"""

    name: str
    count: int
    size_px: tuple[int, int]
    fingerprint: str
    read: Callable[[], Iterator[Item]] = field(repr=False)
    bad: Counter[str] = field(default_factory=Counter)


def folder_files(folder: Path) -> list[Path]:
    """The pictures at any depth, behind links to folders too; links that lead nowhere are included: whoever reads them
    says or counts it. Raises DataError where there is none."""
    endings = {f".{ending}" for ending in PICTURE_ENDINGS}
    named = [path for path in sorted(_below(folder)) if path.suffix.lower() in endings]
    files = [path for path in named if path.is_file() or not path.exists()]
    if not files:
        raise DataError(f"{folder} holds no pictures; allowed: {READ}.")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """What is no folder, in each folder once, however many links lead to it."""
    seen = set[str]()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # which of several links is followed
        yield from (Path(place, name) for name in names)


def generated_folder(folder: Path) -> Pictures:
    """The pictures of a folder, as they are, but for what `t2i sample` and `t2i serve` put beside them: sheets of
    several, animations, and `inputs/`, what clients sent; `bad` counts these. Raises DataError where nothing else is
    there, they are not of one size, or one cannot be read: what a model drew has no bad ones to be left out."""
    files: list[Path] = []
    sizes: dict[tuple[int, int], Path] = {}
    skipped: Counter[str] = Counter()
    for path in folder_files(folder):
        if INPUTS in path.relative_to(folder).parts[:-1]:
            skipped[f"in {INPUTS}/"] += 1
            continue
        try:
            data = path.read_bytes()
            size_px = stored_size(data, str(path))
        except (BadSample, OSError) as error:
            why = error.detail if isinstance(error, BadSample) else error.strerror
            raise DataError(f"{path} cannot be read: {why}.") from error
        image = open_image(data)
        if getattr(image, "is_animated", False):
            skipped["animated"] += 1
            continue
        if "pictures" in _recipe(image):
            skipped["a sheet of several"] += 1
            continue
        files.append(path)
        sizes.setdefault(size_px, path)
        if len(sizes) > 1:
            (first, one), (second, other) = sizes.items()
            raise DataError(
                f"{folder} holds pictures of mixed size: {one.name} is {_wide(first)}, {other.name} {_wide(second)} "
                "px; allowed: one size."
            )
    if not files:
        raise DataError(f"{folder} holds no pictures to measure ({causes(skipped)}).")

    def read() -> Iterator[Item]:
        for path in files:
            image, _ = decode_image(path.read_bytes(), str(path))
            yield Item(_uint8(image), _prompt(path))

    return Pictures(str(folder), len(files), next(iter(sizes)), _fingerprint(files), read, skipped)


def reference(place: str, size_px: tuple[int, int], data: DataConfig, limit: int | None = None) -> Pictures:
    """Real pictures, each resized until it just covers `size_px` and cut to its middle, as training does.

    place: a folder of pictures or of shards, or shards with braces; data: how shards are read; limit: the first ones
    """
    folder = Path(place)
    if not folder.is_dir():
        return shards_pictures(place, size_px, data, limit, needs_captions=False)
    if tars := sorted(folder.glob("*.tar")):
        return shards_pictures(
            [str(path) for path in tars], size_px, data, limit, place, needs_captions=False
        )
    files = folder_files(folder)[:limit]

    bad: Counter[str] = Counter()

    def read() -> Iterator[Item]:
        bad.clear()
        for path in files:
            try:
                image, original = decode_image(path.read_bytes(), str(path), size_px)
            except (BadSample, OSError) as error:
                bad[error.cause if isinstance(error, BadSample) else "file"] += 1
                continue
            yield Item(resize_and_crop(image, original, size_px)[0], _prompt(path))

    return Pictures(place, len(files), size_px, _fingerprint(files), read, bad)


def shards_pictures(
    shards: str | list[str],
    size_px: tuple[int, int],
    data: DataConfig,
    limit: int | None = None,
    name: str | None = None,
    needs_captions: bool = True,
) -> Pictures:
    """The good samples of shards in their order, each once; those without a caption only where none is needed."""
    plain = dataclasses.replace(data, encoded=None, bucket_step_px=None, mixture={}, shards=shards)
    urls = expand(shards, "--reference")
    reader = SampleReader(plain, size_px, key="reference", shards=urls, needs_captions=needs_captions)
    count = len(reader) if limit is None else min(limit, len(reader))
    bad: Counter[str] = Counter()

    def read() -> Iterator[Item]:
        bad.clear()
        for index in range(count):
            (sample,) = reader.read([Wanted(index)])
            if isinstance(sample, BadSample):
                bad[sample.cause] += 1
            else:
                yield Item(sample.picture, next(iter(sample.captions)), sample.metadata)

    remote = "\n".join(url for url in urls if not is_local(url))
    which = "" if needs_captions else "\nwithout captions too"
    digest = hashlib.sha256(contents(urls) + (remote + which).encode()).hexdigest()
    return Pictures(name or str(shards), count, size_px, digest, read, bad)


def batches(pictures: Pictures, batch_size: int) -> Iterator[list[Item]]:
    """In parts of at most `batch_size`. Raises DataError where no picture is there."""
    part: list[Item] = []
    seen = False
    for item in pictures.read():
        seen = True
        part.append(item)
        if len(part) == batch_size:
            yield part
            part = []
    if part:
        yield part
    if not seen:
        raise DataError(f"{pictures.name} holds no picture that can be read ({causes(pictures.bad)}).")


def stacked(items: Sequence[Item]) -> Tensor:
    """(B, 3, H, W) uint8."""
    return torch.stack([item.picture for item in items])


def _prompt(path: Path) -> str:
    """What `t2i sample` wrote into the file, or a text beside it of the same name; "" where there is neither."""
    if path.suffix.lower() == ".png":
        found = _recipe(open_image(path.read_bytes())).get("prompt")
        if isinstance(found, str):
            return found
    beside = path.with_suffix(".txt")
    return beside.read_text(errors="replace").strip() if beside.is_file() else ""


def _recipe(image: Image.Image) -> dict[str, Any]:
    """What `t2i sample` wrote into a PNG's header; {} where there is nothing of the kind."""
    text = image.info.get(RECIPE_KEY) if image.format == "PNG" else None
    try:
        found = json.loads(text or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fingerprint(files: Sequence[Path]) -> str:
    return contents([str(path) for path in files]).hex()


def _uint8(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _wide(size_px: tuple[int, int]) -> str:
    return f"{size_px[1]} x {size_px[0]}"
