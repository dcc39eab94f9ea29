"""Frames of a film: read, put between those that were drawn, written, and how much they flicker."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageSequence
from torch import Tensor

from t2i.config import check
from t2i.data.decode import MAX_PIXELS, BadSample, open_image, reading, resize_and_crop
from t2i.data.members import PICTURE_ENDINGS
from t2i.errors import UserError
from t2i.files import written_whole
from t2i.generation.movie import READERS, is_movie, movie_bytes, read_movie
from t2i.generation.text_to_image import read_image

MAX_FRAMES = 1_000
FRAME_MS = 100  # of a film that does not say


def read_frames(path: Path, size_px: tuple[int, int]) -> tuple[Tensor, float]:
    """(N, 3, H, W) in [-1, 1], each resized and cut to `size_px`, and how long one is shown in milliseconds: of a
    folder its pictures in the order of their names, of an animated GIF, WebP or PNG, or of an MP4 or the like. Raises
    UserError for anything else, and for fewer than 2 frames or more than `MAX_FRAMES`."""
    if path.is_dir():
        endings = tuple(f".{ending.removeprefix('.')}" for ending in PICTURE_ENDINGS)
        files = sorted(each for each in path.iterdir() if each.suffix.lower() in endings)
        _check_count(path, len(files))
        return torch.stack([read_image(each, size_px) for each in files]), FRAME_MS
    try:
        if is_movie(path):
            frames, shown_ms = read_movie(path, size_px, MAX_FRAMES)
            _check_count(path, len(frames))
            return torch.stack(frames).float() / 127.5 - 1, shown_ms
        data = path.read_bytes()
        with reading(str(path)):
            film = open_image(data)
            count, size = getattr(film, "n_frames", 1), (film.height, film.width)
            _check_count(path, count)
            if size[0] * size[1] > MAX_PIXELS // 16:
                raise Image.DecompressionBombError(f"{size[1]} x {size[0]} pixels a frame")
            frames = [
                resize_and_crop(frame.convert("RGB"), size, size_px)[0]
                for frame in ImageSequence.Iterator(film)
            ]
            shown_ms = film.info.get("duration") or FRAME_MS
    except OSError as error:
        raise UserError(f"The film {path} cannot be read: {error.strerror}.") from error
    except BadSample as error:
        raise UserError(
            f"{path} is not a film that can be read: {error}; allowed: a folder of pictures, an animated GIF, WebP "
            f"or PNG, or {', '.join(READERS)}."
        ) from error
    return torch.stack(frames).float() / 127.5 - 1, float(shown_ms)


def _check_count(path: Path, count: int) -> None:
    if not 2 <= count <= MAX_FRAMES:
        raise UserError(f"{path} has {count:,} frames; allowed: 2 to {MAX_FRAMES:,}.")


def key_frames(count: int, every: int) -> list[int]:
    """Every so many of `count` frames from the first, and the last."""
    return sorted({*range(0, count, every), count - 1})


def tweened(source: Tensor, keys: Sequence[int], drawn: Tensor) -> Tensor:
    """All frames: at `keys` those that were drawn (K, 3, H, W); between two of them the frame of the source
    (N, 3, H, W) with what drawing changed, from the one's change to the other's in proportion to the time, in
    [-1, 1]."""
    change = drawn - source[list(keys)]
    frames = source.clone()
    for i, (first, second) in enumerate(pairwise(keys)):
        for frame in range(first, second):
            share = (frame - first) / (second - first)
            frames[frame] += torch.lerp(change[i], change[i + 1], share)
    frames = frames.clamp(-1, 1)
    frames[list(keys)] = drawn
    return frames


def flicker(frames: Tensor, source: Tensor) -> float:
    """How much more neighbouring frames differ than those of the source do: the mean absolute difference of pixels,
    less the source's. Both (N, 3, H, W) in [-1, 1] -> in units of 255."""

    def moved(film: Tensor) -> float:
        return film.diff(dim=0).abs().mean().item() * 127.5

    return moved(frames) - moved(source)


class Frames(Image.Image):
    """Picture files of one size as the frames of a film, of which one at a time is in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self.paths, self.n_frames = paths, len(paths)
        self.seek(0)

    def seek(self, frame: int) -> None:
        with Image.open(self.paths[frame], formats=["PNG"]) as picture:
            shown = picture.convert("RGB")
        self.im, self._size, self._mode, self._frame = shown.im, shown.size, shown.mode, frame

    def tell(self) -> int:
        return self._frame


def write_film(frames: Sequence[Image.Image], path: Path, shown_ms: float) -> Path:
    """An animated WebP without loss, over and over, or an MP4; there is all of it or none. Returns where it is: `path`,
    or where another film is there, a name with a digest in it, so that nothing is written over, the film that these
    frames were drawn from least of all."""
    data = (movie_bytes if is_movie(path) else _webp)(frames, path, shown_ms)
    digest = hashlib.sha256(data).hexdigest()
    for place in (path, *(path.with_stem(f"{path.stem}-{digest[:n]}") for n in (8, 64))):
        try:
            with written_whole(place, is_new=True) as unfinished:
                unfinished.write_bytes(data)
            return place
        except FileExistsError:
            if place.is_file() and place.read_bytes() == data:
                return place
    raise UserError(f"{path} is there and is another film; allowed: another --out.")


def _webp(frames: Sequence[Image.Image], path: Path, shown_ms: float) -> bytes:
    first, *others = frames
    written = io.BytesIO()
    duration = round(shown_ms)
    first.save(
        written, format="WEBP", save_all=True, append_images=others, duration=duration, loop=0, lossless=True
    )
    return written.getvalue()


def check_every(every: int, count: int) -> None:
    """Raises ConfigError for key frames further apart than the film is long."""
    check(1 <= every < count, "--key-every", every, f"1 to {count - 1}, as there are {count} frames")
