"""Films in MP4, WebM and the like, read and written by PyAV (an extra)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from t2i.data.decode import MAX_PIXELS, resize_and_crop
from t2i.errors import UserError

# The reader that each ending is opened by: the library, left to guess, would also take a list of addresses for a film,
# and fetch them.
READERS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
}
CODEC, QUALITY = "libx264", "17"  # of H.264: looks like the frames do
DIGEST = "comment"  # the entry of a film's metadata that has that of its frames


def is_movie(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() in READERS


def read_movie(path: Path, size_px: tuple[int, int]) -> Iterator[tuple[Tensor, float]]:
    """Its frames, (3, H, W) uint8 each, resized until they just cover `size_px` and cut to their middle, turned as the
    film says; with each how long one is shown, in milliseconds on average. One at a time is in memory. Raises UserError
    where it cannot be read whole."""
    av = _library(path)
    try:
        with path.open("rb") as file, av.open(file, format=READERS[path.suffix.lower()]) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no pictures, or its index is missing; allowed: a film, whole.")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS // 16:
                raise UserError(
                    f"{path} has {stream.width} x {stream.height} pixels a frame; allowed: fewer."
                )
            rate = stream.average_rate
            shown_ms = float(1000 / rate) if rate else 100.0
            for frame in container.decode(stream):
                picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                image = Image.fromarray(np.ascontiguousarray(picture))
                yield resize_and_crop(image, (image.height, image.width), size_px)[0], shown_ms
    except av.FFmpegError as error:
        raise UserError(
            f"{path} is not a film that can be read: {error.strerror}; allowed: {', '.join(READERS)}, whole."
        ) from error


def check_whole(path: Path) -> None:
    """Raises UserError for a film that was cut short, of which the library gives what is there without an error: it
    marks a packet, or only says so."""
    av = _library(path)
    before = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with (
            av.logging.Capture() as said,
            path.open("rb") as file,
            av.open(file, format=READERS[path.suffix.lower()]) as container,
        ):
            is_cut = any(packet.is_corrupt for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError):  # `read_movie` says what it is
        return
    finally:
        av.logging.set_level(before[0])
        av.logging.set_skip_repeated(before[1])
    if is_cut or any("ended prematurely" in text for _, _, text in said):
        raise UserError(f"{path} ends within the film, so that frames are missing; allowed: a film, whole.")


def movie_bytes(frames: Sequence[Image.Image], path: Path, shown_ms: float) -> bytes:
    """H.264 in MP4, in half the colour resolution that players expect; an odd last row or column is left out.

    frames: walked through twice: their digest goes in first, as the encoder's bytes are not always the same
    path: where it will be, for an error
    """
    av = _library(path)
    rate = Fraction(1000 / shown_ms).limit_denominator(1001)
    digest = hashlib.sha256(f"{rate} {QUALITY}".encode())
    for picture in _each(frames):
        digest.update(f"{picture.size}".encode() + picture.convert("RGB").tobytes())
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata[DIGEST] = digest.hexdigest()
        stream: Any = container.add_stream(CODEC, rate=rate, options={"crf": QUALITY})
        stream.pix_fmt = "yuv420p"
        for i, picture in enumerate(_each(frames)):
            even = picture.convert("RGB").crop((0, 0, picture.width // 2 * 2, picture.height // 2 * 2))
            if i == 0:
                stream.width, stream.height = even.size
            container.mux(stream.encode(av.VideoFrame.from_image(even)))
        container.mux(stream.encode())
    return file.getvalue()


def frames_in(data: bytes) -> str:
    """The digest of the frames that `movie_bytes` made these bytes of; empty where it did not make them."""
    import av

    try:
        with av.open(io.BytesIO(data), format="mov") as container:
            return container.metadata.get(DIGEST, "")
    except av.FFmpegError:
        return ""


def _each(pictures: Iterable[Image.Image]) -> Iterator[Image.Image]:
    """The pictures, each frame of what has several."""
    for picture in pictures:
        for place in range(getattr(picture, "n_frames", 1)):
            picture.seek(place)
            yield picture


def _library(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{path} needs the package av; `pip install 't2i[video]'` brings it.") from error
    return av
