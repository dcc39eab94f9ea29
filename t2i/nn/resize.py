"""Pictures at a smaller size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def smaller(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *size), as the read path resizes pictures."""
    return F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
