"""The shards that benchmarks/data.py reads: photo-like JPEGs with captions and JSON, in img2dataset's layout."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ["photo", "of", "the", "red", "old", "small", "wooden", "house", "by", "lake", "and", "dark", "sky"]


def write_shards(
    folder: Path, samples: int, per_shard: int, sides_px: tuple[int, int], pictures: Path | None
) -> None:
    """Shards of `samples` samples, unless `folder` is there already.

    sides_px: shortest and longest side; each side of each picture is drawn between
    pictures: folder of photos to cut the pictures from; None: synthetic ones
    Of the pictures at most 400 are different: the bytes are all on disk, and making them takes no hours.
    """
    if folder.exists():
        return
    random = np.random.default_rng(0)
    sources = sorted(path for path in pictures.rglob("*") if path.is_file()) if pictures else []
    made = [_jpeg(random, sides_px, sources) for _ in range(min(samples, 400))]
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    digits = max(5, len(str(samples // per_shard - 1)))
    for shard in range(samples // per_shard):
        with tarfile.open(part / f"{shard:0{digits}d}.tar", "w") as archive:
            for row in range(per_shard):
                jpeg, height, width = made[random.integers(len(made))]
                key = f"{shard:0{digits}d}{row:04d}"
                caption = " ".join(random.choice(WORDS, 12))
                metadata = {
                    "caption": caption,
                    "url": f"https://example.com/{key}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": width,
                    "height": height,
                    "original_width": width,
                    "original_height": height,
                    "exif": "{}",
                    "sha256": "0" * 64,
                }
                members = {"jpg": jpeg, "json": json.dumps(metadata).encode(), "txt": caption.encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    part.rename(folder)


def _jpeg(
    random: np.random.Generator, sides_px: tuple[int, int], sources: list[Path]
) -> tuple[bytes, int, int]:
    """A picture, its height and its width."""
    height, width = (int(side) for side in random.integers(sides_px[0], sides_px[1] + 1, 2))
    image = (
        _cut(random, sources[random.integers(len(sources))], height, width)
        if sources
        else synthetic(random, height, width)
    )
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(random.integers(80, 93)))
    return buffer.getvalue(), height, width


def _cut(random: np.random.Generator, path: Path, height: int, width: int) -> Image.Image:
    """A part of a photo, at least half as long as it, at the size wanted."""
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    scale = random.uniform(0.5, 1) * min(photo.width / width, photo.height / height)
    left = random.uniform(0, photo.width - scale * width)
    top = random.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return photo.resize((width, height), Image.Resampling.BICUBIC, box=box)


def synthetic(random: np.random.Generator, height: int, width: int) -> Image.Image:
    """Grey noise whose amplitude falls about as 1 / frequency, as in photos (Field 1987); colours vary slowly."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1

    def noise(falloff: float) -> np.ndarray:
        phase = np.exp(2j * np.pi * random.random(frequency.shape))
        field = np.fft.irfft2(phase / frequency**falloff, s=(height, width))
        return (field - field.mean()) / field.std()

    ycc = np.stack([128 + 50 * noise(1.25), 128 + 18 * noise(1.6), 128 + 18 * noise(1.6)], axis=-1)
    return Image.fromarray(ycc.clip(0, 255).astype(np.uint8), mode="YCbCr").convert("RGB")
