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
    """x + conv(silu(norm(conv(silu(norm(x))) + linear(silu(time_embedding))))).

    time_dim: width of the time embedding; None for a block that knows no time
    dropout: probability, before the second convolution
    eps: of both group norms (1e-5 in the UNet, 1e-6 in the autoencoder)
    zero_init_out: start as the identity, as diffusion UNets do
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-5,
        zero_init_out: bool = False,
    ) -> None:
        super().__init__()
        out_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(
            group_norm(in_channels, eps), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = (
            None if time_dim is None else nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        )
        self.out_layers = nn.Sequential(
            group_norm(out_channels, eps),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(out_conv) if zero_init_out else out_conv,
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time_embedding: Tensor | None = None) -> Tensor:
        """x: (B, in_channels, h, w), time_embedding: (B, time_dim) -> (B, out_channels, h, w)."""
        h = self.in_layers(x)
        if self.emb_layers is not None:
            h = h + self.emb_layers(time_embedding)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, h/2, w/2) by a 3x3 convolution with stride 2.

    asymmetric: pad right and bottom only, as the autoencoder of LDM does; otherwise all four sides
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


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
