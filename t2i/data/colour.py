"""From the colours of an embedded ICC profile to sRGB, which is what pictures without one are taken for."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

MAX_PROFILE_BYTES = 4 << 20  # those of printing presses have 2 to 3 MiB
KEPT_TRANSFORMS = 16
SAME_LEVELS = 2  # of 255: a profile that moves no colour further is sRGB by another name
LEAST_CONTRAST = 64  # between black and white, or a profile is not one for looking at
MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # by the colour space of a profile


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image`, of any mode without transparency, in RGB, its colours in sRGB.

    profile: the ICC profile that came with it. One that is broken, absurd or made for pictures of another kind is left
        out of account, as if there were none.
    """
    known = _known(profile) if profile and len(profile) <= MAX_PROFILE_BYTES else None
    if known is not None:
        mode, transform = known
        kind = {"CMYK": "CMYK", "L": "L", "1": "L"}.get(image.mode, "RGB")
        fits = mode == kind or (mode, kind) == ("RGB", "L")
        if fits and transform is not None:
            image = _applied(transform, image.convert(mode))
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(KEPT_TRANSFORMS)
def _known(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None] | None:
    """The mode of the pictures that a profile is for, and what brings them to sRGB; None where they are there."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = MODES[source.profile.xcolor_space]
        # As browsers show pictures: what sRGB can show stays as it is, black becomes black.
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        levels = np.arange(256, dtype=np.uint8)
        black_to_white = {
            "RGB": levels[:, None].repeat(3, 1),
            "L": levels,
            "CMYK": np.stack([levels * 0] * 3 + [255 - levels], axis=-1),
        }[mode]
        shown = np.asarray(_applied(transform, Image.fromarray(black_to_white[None], mode)))[0].mean(axis=-1)
    except (ImageCms.PyCMSError, KeyError, OSError, TypeError, ValueError):
        return None
    if shown[-1] - shown[0] < LEAST_CONTRAST or (np.diff(shown) < -SAME_LEVELS).any():
        return None
    return mode, None if _is_srgb(transform, mode) else transform


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether it leaves every colour where it is."""
    if mode == "CMYK":
        return False
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    colours = Image.fromarray(
        np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        if mode == "RGB"
        else np.arange(256, dtype=np.uint8)[None]
    )
    there, here = (np.asarray(i).astype(int) for i in (colours.convert("RGB"), _applied(transform, colours)))
    return bool(np.abs(there - here).max() <= SAME_LEVELS)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    found = ImageCms.applyTransform(image, transform)
    assert found is not None  # it would be where the picture was changed in place
    return found
