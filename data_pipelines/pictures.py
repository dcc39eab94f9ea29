"""A picture file from somewhere, checked and made ready for a shard: its own bytes wherever they will do."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Literal, TypeAlias

from PIL import ExifTags, Image

from t2i.data.decode import decode_image, open_image, reading, resize

Extension: TypeAlias = Literal["jpg", "png", "webp"]
KEPT: dict[str, Extension] = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # stored byte for byte
QUALITY = 95  # as img2dataset


@dataclass(frozen=True)
class Picture:
    """image: the file for the shard; None: the source's own bytes. The rest as in `shard_writer.Sample`."""

    image: bytes | None
    extension: Extension
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str | None
    sha256: str


def prepare(
    data: bytes, key: str, shorter_side_px: int | None = None, extension: Extension | None = None
) -> Picture:
    """Checks that `data` is a whole picture, and makes of it what a shard stores.

    shorter_side_px: a picture whose shorter side is longer is reduced to it, upright and on white, as a JPEG whose
        colours are not subsampled: at its final size that would be a loss. None: nothing is reduced.
    extension: of all pictures; those of other formats are encoded anew, upright, on white and in sRGB: png and webp
        without loss, jpg as above. None: a JPEG, PNG or WebP that is not reduced stays as it is, others become PNG.
    Of an animation in another format, the first frame counts. Nothing is enlarged. Widths and heights count after EXIF
    orientation, as training sees the picture.
    Raises BadSample: "bomb" for too many pixels, "aspect" for a strip, else "image".
    """
    kind, size, exif = _header(data, key)
    covering = None if shorter_side_px is None or min(size) <= shorter_side_px else shorter_side_px
    kept = covering is None and kind in KEPT and extension in (None, KEPT[kind])
    # Without reducing, an eighth of a JPEG's resolution tells whether its data are whole.
    least_px = covering or (1 if kept else None)
    picture, (height, width) = decode_image(data, key, (least_px, least_px) if least_px else None)
    digest = hashlib.sha256(data).hexdigest()
    if kept:
        return Picture(None, KEPT[kind], width, height, width, height, exif, digest)
    if covering is not None:
        scale = covering / min(height, width)
        pixels = resize(picture, (round(height * scale), round(width * scale)))
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    made = extension or ("png" if covering is None else "jpg")
    return Picture(_encoded(picture, made), made, *picture.size, width, height, exif, digest)


def _encoded(picture: Image.Image, extension: Extension) -> bytes:
    buffer = io.BytesIO()
    if extension == "jpg":
        picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    elif extension == "webp":
        picture.save(buffer, "WEBP", lossless=True)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()


def _header(data: bytes, key: str) -> tuple[str, tuple[int, int], str | None]:
    """Format, size and EXIF tags."""
    with reading(key):
        image = open_image(data)
        return image.format or "", image.size, _exif(image)


def _exif(image: Image.Image) -> str | None:
    """{"Image Model": "...", "EXIF ExposureTime": "...", ...} as text, "{}" for a picture without; None where it
    cannot be read. Binary values (thumbnails, makers' notes) are left out."""
    try:
        tags = image.getexif()
        groups = {
            "Image": tags,
            "EXIF": tags.get_ifd(ExifTags.IFD.Exif),
            "GPS": tags.get_ifd(ExifTags.IFD.GPSInfo),
        }
        named = {
            f"{group} {(ExifTags.GPSTAGS if group == 'GPS' else ExifTags.TAGS).get(tag, hex(tag))}": str(
                value
            ).strip()
            for group, found in groups.items()
            for tag, value in found.items()
            if not isinstance(value, bytes | dict)
        }
        return json.dumps(named)
    except Exception:  # untrusted metadata; the picture may be good all the same
        return None
