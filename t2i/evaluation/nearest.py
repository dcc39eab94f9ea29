"""Judges pictures of a small closed set by the real picture that is nearest.

Where every combination of attributes has one real picture, the nearest of them says what a generated picture
shows. The judge knows the held-out pictures too: they are candidates like the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class NearestJudge:
    """Classification by the nearest real picture: pixel L2 at half resolution (2 x 2 pixels averaged, so that
    blur and fine noise count less). A picture that ignores its caption is right for 1 of N."""

    def __init__(self, images: Tensor, attributes: Sequence[dict[str, str]]) -> None:
        """images: (N, 3, H, W) in [-1, 1], H and W even; attributes: of each of them, with the same names."""
        if len(images) != len(attributes):
            raise ValueError(f"{len(images)} images but {len(attributes)} attributes")
        self.size_px = images.shape[-2:]
        self.references = _half_resolution(images)
        self.attributes = list(attributes)

    def predict(self, images: Tensor) -> list[dict[str, str]]:
        """(B, 3, H, W) in [-1, 1], of the size of the real ones -> the attributes of the real picture that is
        nearest to each."""
        if images.shape[-2:] != self.size_px:
            raise ValueError(f"images are {tuple(images.shape[-2:])} px; the real ones {tuple(self.size_px)}")
        distance = torch.cdist(_half_resolution(images), self.references)
        return [self.attributes[index] for index in distance.argmin(dim=1).tolist()]


def _half_resolution(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 3 * H/2 * W/2) float32 on the CPU."""
    return F.avg_pool2d(images.detach().float().cpu().clamp(-1, 1), kernel_size=2).flatten(1)
