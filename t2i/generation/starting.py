"""Pictures to start from: with a mask, and on a larger canvas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.config import check
from t2i.data.decode import BadSample, stored_size
from t2i.errors import UserError
from t2i.generation.extension import SIDES, around
from t2i.generation.prompts import MAX_PX
from t2i.generation.text_to_image import read_image


@dataclass(frozen=True)
class Start:
    """image: (3, H, W) in [-1, 1]; mask: (1, H, W), 1 where it is drawn anew, or None where there is no mask"""

    image: Tensor
    mask: Tensor | None

    @property
    def size_px(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[2]


def read_start(
    image: Path,
    size_px: tuple[int, int] | None,
    mask: Path | None = None,
    extend: Mapping[str, int] | None = None,
) -> Start:
    """A picture file with what is to be drawn anew of it: as `read_mask` has it, and what it is extended by, where its
    outermost pixels stand until they are drawn over.

    extend: pixels by side: left, right, top, bottom
    size_px: (H, W) that the picture is resized and cut to, and the mask with it, before it is extended; None: as it is
    Raises UserError for files that are no pictures, ConfigError for a mask of another size than the picture, and where
        a side of the whole would be longer than MAX_PX.
    """
    stored = size_of(image)
    size_px = size_px or stored
    whole = [side + more for side, more in zip(size_px, around(extend or {}), strict=True)]
    allowed = f"up to {MAX_PX:,} each (height x width)"
    check(max(whole) <= MAX_PX, f"{image}, extended,", f"{whole[0]} x {whole[1]} px", allowed)
    pixels, marked = read_image(image, size_px), None
    if mask is not None:
        found = size_of(mask)
        words = [f"{height} x {width} pixels" for height, width in (found, stored)]
        check(found == stored, f"--mask {mask}", words[0], f"{words[1]}, as {image} has (height x width)")
        marked = read_mask(mask, size_px)
        allowed = "white (128 or more of 255) where the picture is drawn anew"
        check(bool(marked.any()), f"--mask {mask}", "white nowhere", allowed)
    if extend is not None:
        sides = tuple(extend.get(side, 0) for side in SIDES)
        marked = F.pad(torch.zeros(1, *size_px) if marked is None else marked, sides, value=1.0)
        pixels = F.pad(pixels[None], sides, mode="replicate")[0]
    return Start(pixels, marked)


def read_mask(path: Path, size_px: tuple[int, int]) -> Tensor:
    """(1, H, W), 1 where a picture file is white: 128 or more of 255, on black where it is transparent; resized and cut
    as a picture is. Raises UserError for a file that is no picture."""
    return (read_image(path, size_px, ground="black").mean(0, keepdim=True) > 0).float()


def size_of(path: Path) -> tuple[int, int]:
    """(height, width) of a picture file, upright. Raises UserError for one that is none."""
    try:
        return stored_size(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"The picture {path} cannot be read: {error.strerror}.") from error
    except BadSample as error:
        raise UserError(f"{path} is not a picture that can be read: {error.detail}.") from error
