"""How white the background of a drawn picture is, where the real picture of the same prompt has a white one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from t2i.training.pictures import to_uint8

WHITE = 253  # of 255 in every channel: JPEG moves white by a level or two
MARGIN = 1 / 32  # of the side: outlines that stand a little elsewhere are no background


def white_deviation(images: Tensor, real: Tensor) -> float | None:
    """Mean of 255 minus the value, over channels and over the pixels where `real` is white and no pixel nearby is
    anything else; None where there are no such pixels.

    images, real: (N, 3, H, W) in [-1, 1], drawn and real pictures of the same prompts
    """
    margin_px = round(MARGIN * real.shape[-1])
    coloured = (to_uint8(real) < WHITE).any(dim=1, keepdim=True).float()
    white = F.max_pool2d(coloured, 2 * margin_px + 1, stride=1, padding=margin_px) == 0
    if not white.any():
        return None
    off = 255 - to_uint8(images).float()
    return float(off[white.expand_as(off)].double().mean())
