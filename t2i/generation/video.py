"""Frames of a film: read, put between those that were drawn, written, and how much they flicker."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image, ImageSequence
from torch import Tensor

from t2i.config import check
from t2i.data.decode import MAX_PIXELS, BadSample, open_image, reading, resize_and_crop
from t2i.data.members import PICTURE_ENDINGS
from t2i.errors import UserError
from t2i.few import plural
from t2i.files import written_whole
from t2i.generation.movie import READERS, check_whole, frames_in, is_movie, movie_bytes, read_movie
from t2i.generation.text_to_image import read_image

MAX_FRAMES = 1_000
FRAME_MS = 100  # of a film that does not say


class Film:
    """The frames of a film, (3, H, W) in [-1, 1] each, resized and cut to `size_px`: of a folder its pictures in the
    order of their names, of an animated GIF, WebP or PNG, or of an MP4 or the like. However often they are walked
    through, they are read anew, and one at a time is in memory.

    shown_ms: how long one is shown, in milliseconds
    Raises UserError for anything else, and for fewer than 2 frames or more than `MAX_FRAMES`.
    """

    def __init__(self, path: Path, size_px: tuple[int, int]) -> None:
        self.path, self.size_px = path, size_px
        self.count, self.shown_ms = 0, float(FRAME_MS)
        if is_movie(path) and path.is_file():
            check_whole(path)
        self._next: tuple[int, Iterator[Tensor]] = 0, iter(())  # of `frame`
        for _, shown_ms in self._read():
            self.count, self.shown_ms = self.count + 1, shown_ms
            if self.count > MAX_FRAMES:
                break
        _check_count(path, self.count)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (frame for frame, _ in self._read())

    def frame(self, place: int) -> Tensor:
        """The frame there; of one after another the film is read once."""
        number, frames = self._next
        if number == 0 or place < number:
            number, frames = 0, iter(self)
        found = next(islice(frames, place - number, None))
        self._next = place + 1, frames
        return found

    def _read(self) -> Iterator[tuple[Tensor, float]]:
        if self.path.is_dir():
            endings = tuple(f".{ending.removeprefix('.')}" for ending in PICTURE_ENDINGS)
            files = sorted(
                each for each in self.path.iterdir() if each.suffix.lower() in endings and each.is_file()
            )
            _check_count(self.path, len(files))
            yield from ((read_image(each, self.size_px), float(FRAME_MS)) for each in files)
            return
        try:
            read = read_movie if is_movie(self.path) else _read_animation
            for frame, shown_ms in read(self.path, self.size_px):
                yield frame.float() / 127.5 - 1, shown_ms
        except OSError as error:
            raise UserError(f"The film {self.path} cannot be read: {error.strerror}.") from error
        except BadSample as error:
            raise UserError(
                f"{self.path} is not a film that can be read: {error.detail}; allowed: a folder of pictures, an "
                f"animated GIF, WebP or PNG, or {', '.join(READERS)}."
            ) from error


def _read_animation(path: Path, size_px: tuple[int, int]) -> Iterator[tuple[Tensor, float]]:
    """As `read_movie`."""
    data = path.read_bytes()
    with reading(str(path)):
        film = open_image(data)
        count, size = getattr(film, "n_frames", 1), (film.height, film.width)
        if size[0] * size[1] > MAX_PIXELS // 16:
            raise Image.DecompressionBombError(f"{size[1]} x {size[0]} pixels a frame")
        frames = ImageSequence.Iterator(film)
    _check_count(path, count)
    while True:
        with reading(str(path)):
            if (shown := next(frames, None)) is None:
                return
            frame = resize_and_crop(shown.convert("RGB"), size, size_px)[0]
        yield frame, float(film.info.get("duration") or FRAME_MS)


def _check_count(path: Path, count: int) -> None:
    if not 2 <= count <= MAX_FRAMES:
        raise UserError(f"{path} has {plural(count, 'frame')}; allowed: 2 to {MAX_FRAMES:,}.")


def key_frames(count: int, every: int) -> list[int]:
    """Every so many of `count` frames from the first, and the last."""
    return sorted({*range(0, count, every), count - 1})


def tweened(
    source: Iterable[Tensor], keys: Sequence[int], drawn: Callable[[int], Tensor]
) -> Iterator[Tensor]:
    """All frames, one at a time: at `keys`, which have both ends, those that were drawn; between two of them the frame
    of the source with what drawing changed, from the one's change to the other's in proportion to the time. (3, H, W)
    in [-1, 1] each. source: is walked through twice at once, the one ahead to the next key"""
    wanted = set(keys)
    changes = (drawn(i) - frame for i, frame in enumerate(source) if i in wanted)
    frames = enumerate(source)
    change = next(changes)
    for first, second in pairwise(keys):
        last, change = change, next(changes)
        for i, frame in islice(frames, second - first):
            share = (i - first) / (second - first)
            yield drawn(i) if i == first else (frame + torch.lerp(last, change, share)).clamp(-1, 1)
    yield drawn(keys[-1])


def flicker(frames: Iterable[Tensor], source: Iterable[Tensor]) -> float:
    """How much more neighbouring frames differ than those of the source do: the mean absolute difference of pixels,
    less the source's. Both N of (3, H, W) in [-1, 1] -> in units of 255."""

    def moved(film: Iterable[Tensor]) -> float:
        return fmean((after - before).abs().mean().item() for before, after in pairwise(film)) * 127.5

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
    encoded, digest = (movie_bytes, frames_in) if is_movie(path) else (_webp, _sha256)
    data = encoded(frames, path, shown_ms)
    known_by = digest(data)
    for place in (path, *(path.with_stem(f"{path.stem}-{known_by[:n]}") for n in (8, 64))):
        try:
            with written_whole(place, is_new=True) as unfinished:
                unfinished.write_bytes(data)
            return place
        except FileExistsError:
            if place.is_file() and digest(place.read_bytes()) == known_by:
                return place
    raise UserError(f"{path} is there and is another film; allowed: another --out.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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
