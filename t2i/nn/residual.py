"""Residual blocks and resampling of convolutional networks (BigGAN's, as used in ADM, arXiv:2105.05233).

Submodules carry the names of CompVis' UNet, so that its published weights load as they are.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from t2i.nn.norm import group_norm
from t2i.nn.precision import without_autocast


def zero_init(module: nn.Module) -> nn.Module:
    """Sets all parameters to zero: a residual branch that ends in `module` starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + linear(silu(time_embedding))))), at first the identity.

    time_dim: width of the time embedding
    dropout: probability, before the second convolution
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        out_conv = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.in_layers = nn.Sequential(
            group_norm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(group_norm(out_channels), nn.SiLU(), nn.Dropout(dropout), out_conv)
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """x: (B, in_channels, h, w), time_embedding: (B, time_dim) -> (B, out_channels, h, w)."""
        h = self.in_layers(x) + self.emb_layers(time_embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2) for even sides, by a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(doubled(x))


class Doubled(nn.Module):
    """`doubled`, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x)


def doubled(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, 2h, 2w), nearest neighbour, in the dtype of x: a GPU's autocast would bring it to
    float32, and with it all that is added to it."""
    with without_autocast(x.device):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
