"""How pictures are brought to the size that a network takes: a Fréchet distance moves by whole points with it (Parmar
et al., 2104.11222), so that a figure says which of these was used. The names are clean-fid's."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ResizeName = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]


def resized(pictures: Tensor, size_px: int, how: ResizeName) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, size_px, size_px) float32 in [0, 255], not rounded.

    how: "clean": Pillow's bicubic, antialiased, in float (clean-fid); "legacy_pytorch": torch's bilinear without
        antialiasing (pytorch-fid); "legacy_tensorflow": TensorFlow 1's bilinear, whose corners do not lie on the
        picture's (torch-fidelity and the first published figures)
    """
    if how == "clean":
        return torch.stack([_clean(picture, size_px) for picture in pictures])
    if how == "legacy_pytorch":
        return F.interpolate(pictures.float(), (size_px, size_px), mode="bilinear", align_corners=False)
    return _tensorflow(pictures.float(), size_px)


def _clean(picture: Tensor, size_px: int) -> Tensor:
    channels = [Image.fromarray(channel.numpy().astype(np.float32)) for channel in picture]
    wide = [np.asarray(channel.resize((size_px, size_px), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(wide)).clamp(0, 255)


def _tensorflow(x: Tensor, size_px: int) -> Tensor:
    """Pixel i is taken at i * H / size_px, in place of (i + 0.5) * H / size_px - 0.5."""
    for dim in (3, 2):  # the products are TensorFlow's, along x first
        length = x.shape[dim]
        place = torch.arange(size_px, dtype=x.dtype) * torch.tensor(length / size_px, dtype=x.dtype)
        low = place.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        share = (place - low).view(-1, *[1] * (3 - dim))
        first, second = x.index_select(dim, low), x.index_select(dim, high)
        x = first + (second - first) * share
    return x
