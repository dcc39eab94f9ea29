"""Untrusted encoded bytes to RGB pictures of one size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from t2i.data.colour import to_srgb
from t2i.data.members import PICTURE_ENDINGS, PICTURE_FORMATS, READ, UNREAD_ENDINGS, member

TGA_SIGNATURE = b"TRUEVISION-XFILE.\0"  # at the end; a file without it may be anything
MAX_PIXELS = 89_478_485  # a quarter of a gibibyte as RGB; Pillow's own threshold for a warning
PNG_SCALES = {"L;2": 85, "L;4": 17}  # Pillow's names of grey in 2 and 4 bits: to 255
GREY_MODES = ("1", "L", "LA", "La")
MAX_ASPECT = 100  # longer side to shorter one: a crop shows next to nothing of a picture beyond
MAX_SURPLUS = 8  # times the pixels of a crop that are resized and cut; of longer pictures, the crop alone
EXIF_ORIENTATION = 0x0112
TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)


class BadSample(Exception):
    """A sample that cannot be used.

    cause: "image" (missing or not decodable), "format" (a kind of picture that is not read), "bomb" (too many
        pixels), "aspect" (longer than MAX_ASPECT times its width), "caption", "json"; of the tar file "truncated",
        "damaged", "duplicate", "link" or "sparse"; "missing" (not in the shard, or the shard is not there) or
        "unreadable" (the shard, or what it is read from)
    key: the sample's key
    detail: what is wrong in words, without a full stop
    """

    def __init__(self, cause: str, key: str, detail: str = "") -> None:
        super().__init__(f"sample {key}: {cause}: {detail}" if detail else f"sample {key}: {cause}")
        self.cause = cause
        self.key = key
        self.detail = (detail or cause).rstrip(".")


def image_bytes(members: Mapping[str, bytes], key: str) -> bytes:
    """The member that is the picture. Raises BadSample: "format" where there is one only of a kind that is not read,
    "image" where there is none, or several of which none is meant (see `t2i.data.members.member`)."""
    found = member(members, PICTURE_ENDINGS)
    if found is not None:
        return members[found]
    unread = member(members, UNREAD_ENDINGS)
    if unread is not None:
        raise BadSample("format", key, f"{unread} is not read; allowed: {READ}")
    raise BadSample("image", key, f"no picture among {sorted(members)}, or none that is meant")


Image.init()  # all of Pillow's readers, so that it knows each of PICTURE_FORMATS that it has


def open_image(data: bytes) -> Image.Image:
    """The picture, its header read, its pixels not; of PICTURE_FORMATS alone. Raises whatever Pillow raises."""
    formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]
    if not data.endswith(TGA_SIGNATURE):
        formats.remove("TGA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of size, where MAX_PIXELS stands in its place
        image = Image.open(io.BytesIO(data), formats=formats)
    _scale_transparency(image)
    return image


def _scale_transparency(image: Image.Image) -> None:
    """A PNG names its transparent colour in its own bits, and Pillow compares it with pixels of 8 bits."""
    colour, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or colour is None or not tiles:
        return
    if (kind := tiles[0][3]) in PNG_SCALES:
        image.info["transparency"] = colour * PNG_SCALES[kind]
    elif kind == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def decode_image(
    data: bytes,
    key: str,
    size_px: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    ground: str = "white",
) -> tuple[Image.Image, tuple[int, int]]:
    """An upright picture in sRGB (see `t2i.data.colour`), and its (height, width) as stored, after EXIF
    orientation.

    size_px: (H, W) that the picture will be resized to cover. A JPEG is then decoded at 1/2, 1/4 or 1/8 of
        its size, in the domain of its cosine transform, as long as the result still covers (H, W).
    ground: the colour that shows where it is transparent
    Of an animation, the first frame. Raises BadSample: "bomb" for more than `max_pixels`, "aspect" for a strip, else
    "image" for whatever is wrong with the bytes.
    """
    with reading(key):
        image, transposed = _opened(data, key, max_pixels)
        original = (image.width, image.height) if transposed else (image.height, image.width)
        if size_px is not None:
            height, width = covering_size(original, size_px)
            image.draft(None, (height, width) if transposed else (width, height))
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, ground), original


def stored_size(data: bytes, key: str) -> tuple[int, int]:
    """(height, width) of a picture by its header, after EXIF orientation. Raises BadSample as `decode_image`."""
    with reading(key):
        image, transposed = _opened(data, key, MAX_PIXELS)
        return (image.width, image.height) if transposed else (image.height, image.width)


def _opened(data: bytes, key: str, max_pixels: int) -> tuple[Image.Image, bool]:
    """The picture, not decoded yet, and whether it lies on its side."""
    image = open_image(data)
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, allowed: {max_pixels}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        allowed = f"a longer side of at most {MAX_ASPECT} times the shorter one"
        raise BadSample("aspect", key, f"{image.width} x {image.height} pixels, allowed: {allowed}")
    return image, image.getexif().get(EXIF_ORIENTATION) in TRANSPOSING_ORIENTATIONS


@contextmanager
def reading(key: str) -> Iterator[None]:
    """BadSample in the place of what Pillow raises. What it warns of, and reads all the same, is not shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("bomb", key, str(error)) from error
    except Image.UnidentifiedImageError as error:  # its message holds an address, another one each time
        raise BadSample("image", key, "not a picture in a known format") from error
    except Exception as error:  # Pillow's readers raise nearly anything on bytes that are not what they claim
        raise BadSample("image", key, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image, ground: str) -> Image.Image:
    """In sRGB, without a profile."""
    image.load()
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255 instead of scaling
        levels, transparent = np.asarray(image), image.info.get("transparency")
        grey = levels.astype(np.float32).clip(0, 65535) / 257
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        plain = rgba.getchannel("R") if image.mode in GREY_MODES else rgba.convert("RGB")
        opaque = to_srgb(plain, profile)
        opaque.putalpha(rgba.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", rgba.size, ground), opaque).convert("RGB")
    found = to_srgb(image, profile)
    found.info.pop("icc_profile", None)  # else who saves it again would have its colours moved twice
    return found


def covering_size(original: tuple[int, int], size_px: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the smallest picture of `original`'s shape that covers `size_px`."""
    scale = max(size_px[0] / original[0], size_px[1] / original[1])
    return max(size_px[0], round(original[0] * scale)), max(size_px[1], round(original[1] * scale))


def resize(image: Image.Image, size_px: tuple[int, int]) -> Tensor:
    """Antialiased bicubic: the filter is widened to the area that each target pixel covers. Equals Pillow's BICUBIC to
    two levels where nothing overshoots; torch's kernels for bytes are several times as fast.

    image: RGB
    size_px: (H, W)
    returns (3, H, W) uint8
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    if pixels.shape[2:] != size_px:
        pixels = functional.interpolate(pixels, size_px, mode="bicubic", antialias=True)
    return pixels[0]


def resize_and_crop(
    image: Image.Image,
    original: tuple[int, int],
    size_px: tuple[int, int],
    place: tuple[float, float] | None = None,
) -> tuple[Tensor, tuple[int, int]]:
    """Resizes until the picture just covers `size_px`, then cuts that out.

    original: (height, width) before any scaled decoding, which decides the size before the crop
    size_px: (H, W)
    place: where the crop lies between top and bottom, left and right, each in [0, 1); None: in the middle
    returns (3, H, W) uint8 and the (top, left) of the crop in pixels after resizing
    """
    covering = covering_size(original, size_px)
    free = covering[0] - size_px[0], covering[1] - size_px[1]
    if place is None:
        top, left = free[0] // 2, free[1] // 2
    else:
        top, left = int(place[0] * (free[0] + 1)), int(place[1] * (free[1] + 1))
    if covering[0] * covering[1] <= MAX_SURPLUS * size_px[0] * size_px[1]:
        cropped = resize(image, covering)[:, top : top + size_px[0], left : left + size_px[1]].contiguous()
    else:  # a long picture that is enlarged would take as much memory as it is long
        cropped = _resized_part(image, covering, (top, left), size_px)
    return cropped, (top, left)


def _resized_part(
    image: Image.Image, covering: tuple[int, int], corner: tuple[int, int], size_px: tuple[int, int]
) -> Tensor:
    """What `resize` to `covering` makes of the `size_px` pixels from `corner` (top, left) on, to two levels."""
    steps = image.height / covering[0], image.width / covering[1]
    upper, left = corner[0] * steps[0], corner[1] * steps[1]
    lower = min((corner[0] + size_px[0]) * steps[0], image.height)
    right = min((corner[1] + size_px[1]) * steps[1], image.width)
    # Pillow's filter reaches over the edges of the box, as of a whole picture that was cut afterwards.
    part = image.resize(size_px[::-1], Image.Resampling.BICUBIC, (left, upper, right, lower))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous()
