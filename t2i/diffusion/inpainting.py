"""What stays of a picture while the rest of it is drawn anew."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from t2i.diffusion.levels import Level
from t2i.diffusion.sampler import Constrain


def kept(x0: Tensor, noise: Tensor, mask: Tensor) -> Constrain:
    """Where the mask is 0, x at each level is the known x0 with the noise that the walk started from (blended latent
    diffusion, 2206.02779, algorithm 1; RePaint, 2201.09865, eq. 8a, draws that noise afresh).

    x0, noise: (B, C, h, w); mask: (B, 1, h, w), 1 where drawn anew
    """

    def constrain(x: Tensor, level: Level) -> Tensor:
        alpha, sigma = level
        return mask * x + (1 - mask) * (alpha * x0 + sigma * noise)

    return constrain


def coarse_mask(mask: Tensor, factor: int) -> Tensor:
    """(B, 1, H, W) -> (B, 1, H / factor, W / factor): 1 where any pixel of a position is drawn anew."""
    return F.max_pool2d(mask, factor)


def pasted(drawn: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """`drawn` with the pixels of `image` where the mask is 0. (B, 3, H, W) each, mask (B, 1, H, W)."""
    return mask * drawn + (1 - mask) * image
