"""Tensors to PNG: single pictures and grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i.files import written_whole


def to_uint8(image: Tensor) -> Tensor:
    """(..., 3, H, W) float in [-1, 1] -> the same shape, uint8, rounded and clamped."""
    return image.detach().float().cpu().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) float in [-1, 1] -> an RGB picture."""
    return Image.fromarray(np.ascontiguousarray(to_uint8(image).permute(1, 2, 0).numpy()))


def grid(images: Tensor, columns: int, gap_px: int = 2) -> Tensor:
    """(N, 3, H, W) -> (3, rows*(H+gap)-gap, columns*(W+gap)-gap), row by row, on white."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    sheet = images.new_ones(
        channels, rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px, device="cpu"
    )
    for i, image in enumerate(images.detach().cpu()):
        top, left = (i // columns) * (height + gap_px), (i % columns) * (width + gap_px)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def save_png(image: Tensor, path: Path, **text: str) -> None:
    """Writes (3, H, W) in [-1, 1] as `save_picture` does."""
    save_picture(to_pil(image), path, is_new=False, **text)


def save_picture(picture: Image.Image, path: Path, is_new: bool = False, **text: str) -> None:
    """Writes a PNG, with `text` as its text chunks; there is all of the file or none.

    is_new: raise FileExistsError where `path` is there, and leave it alone
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    with written_whole(path, is_new) as unfinished:
        picture.save(unfinished, format="PNG", pnginfo=info)
