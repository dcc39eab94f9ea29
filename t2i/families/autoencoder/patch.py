"""A backbone for small machines: the PCA of picture patches, with a learned convolutional residual on top.

The linear part alone is the best linear code of its size, so that training starts from pictures instead of noise
(docs/decisions.md says how good they are); both residual branches start at zero.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from t2i.families.autoencoder.config import PatchBackboneConfig
from t2i.nn.norm import GroupNorm
from t2i.nn.residual import zero_init

INITIAL_LOG_VARIANCE = -6.0  # noise of 5% of the code's standard deviation


class ConvBlock(nn.Module):
    """Residual block of two 3x3 convolutions, (B, width, h, w) -> the same; the second starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        zero_init(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(nn.functional.silu(self.conv1(self.norm(x))))


def residual_branch(in_channels: int, width: int, depth: int, out_channels: int) -> nn.Sequential:
    """Convolutions at the latent's resolution whose output starts at zero."""
    out = zero_init(nn.Conv2d(width, out_channels, 1))
    blocks = [ConvBlock(width) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1), *blocks, nn.SiLU(), out)


class PatchEncoder(nn.Module):
    """(B, 3, H, W) -> (B, out_channels, H/f, W/f). Of out_channels the first C are the code; those beyond
    (a posterior's log-variance) have the residual branch alone and start at INITIAL_LOG_VARIANCE."""

    def __init__(self, config: PatchBackboneConfig, out_channels: int) -> None:
        super().__init__()
        self.patch_px, self.latent_channels = config.patch_px, config.latent_channels
        patch_dim = 3 * config.patch_px**2
        self.linear = nn.Conv2d(patch_dim, config.latent_channels, 1)
        self.residual = residual_branch(patch_dim, config.width, config.depth, out_channels)
        nn.init.constant_(self.residual[-1].bias[config.latent_channels :], INITIAL_LOG_VARIANCE)  # type: ignore

    def forward(self, image: Tensor) -> Tensor:
        patches = to_patches(image, self.patch_px)
        out = self.residual(patches)
        code, rest = out.split([self.latent_channels, out.shape[1] - self.latent_channels], dim=1)
        return torch.cat([code + self.linear(patches), rest], dim=1)


class PatchDecoder(nn.Module):
    """(B, C, h, w) -> (B, 3, h*f, w*f)."""

    def __init__(self, config: PatchBackboneConfig) -> None:
        super().__init__()
        self.patch_px = config.patch_px
        patch_dim = 3 * config.patch_px**2
        self.linear = nn.Conv2d(config.latent_channels, patch_dim, 1)
        self.residual = residual_branch(config.latent_channels, config.width, config.depth, patch_dim)

    @property
    def last_layer(self) -> Tensor:
        """The weight where the adaptive GAN weight compares gradients."""
        return self.residual[-1].weight  # type: ignore[return-value]

    def forward(self, latent: Tensor) -> Tensor:
        return from_patches(self.linear(latent) + self.residual(latent), self.patch_px)


@torch.no_grad()
def initialise_from_pca(encoder: PatchEncoder, decoder: PatchDecoder, image: Tensor) -> None:
    """Sets both linear parts to the principal components of the patches of `image` (B, 3, H, W), scaled to
    unit variance over all channels together and half-way whitened: each component is divided by the square
    root of its standard deviation. Diffusion learns faster from that than from the components as they are,
    whose small ones drown in its errors, or from fully whitened ones, where they count as much as the large
    (docs/decisions.md has the figures)."""
    assert encoder.linear.bias is not None
    assert decoder.linear.bias is not None
    patches = rearrange(to_patches(image, encoder.patch_px), "b d h w -> (b h w) d").double()
    mean = patches.mean(0)
    variance, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    top = directions.flip(1)[:, : encoder.latent_channels]  # eigh sorts ascending
    variance = variance.flip(0)[: encoder.latent_channels].clamp_min(1e-8)
    scale = variance**0.25  # the square root of each component's standard deviation
    scale = scale * (variance / scale**2).mean().sqrt()
    encoder.linear.weight.copy_((top.T / scale[:, None])[:, :, None, None])
    encoder.linear.bias.copy_(-(top.T @ mean) / scale)
    decoder.linear.weight.copy_((top * scale)[:, :, None, None])
    decoder.linear.bias.copy_(mean)


def to_patches(image: Tensor, patch_px: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3*p*p, H/p, W/p)."""
    return nn.functional.pixel_unshuffle(image, patch_px)


def from_patches(patches: Tensor, patch_px: int) -> Tensor:
    """The inverse of `to_patches`."""
    return nn.functional.pixel_shuffle(patches, patch_px)
