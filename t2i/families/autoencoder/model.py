"""The convolutional encoder and decoder of latent diffusion (Rombach et al., 2112.10752, appendix), which are
those of VQGAN (Esser et al., 2012.09841, table 7).

Submodules carry the names of the published checkpoints (`down.0.block.1.conv1.weight`), so that loading those
is the identity.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.autoencoder.model_config import EncoderDecoderConfig
from t2i.nn.norm import GroupNorm, group_norm
from t2i.nn.residual import Upsample


def _norm(channels: int) -> GroupNorm:
    return group_norm(channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): norm, SiLU, 3x3 conv, twice, plus the (projected) input.

    The denoisers' block in `t2i.nn.residual` differs in time conditioning, eps and, in checkpoints, in every
    name; one block for both would be mostly switches.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """(B, C, H, W) -> the same: single-head self-attention over the H*W positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (project(h).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1 head, H*W, C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2) for even sides. (The UNet's layer is named `op`, not `conv`.)"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Padded at the right and bottom only: the published weights were trained so.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """The blocks of one resolution, and the change to the next."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, attention: bool, dropout: float
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if attention else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return self.upsample(self.downsample(h))


class _Middle(nn.Module):
    def __init__(self, channels: int, config: EncoderDecoderConfig) -> None:
        super().__init__()
        dropout = config.dropout
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttentionBlock(channels) if config.mid_attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] -> (B, out_channels, H/f, W/f), f = config.downsampling; H and W are
    multiples of f.

    out_channels: 2 * latent_channels for the moments of a Gaussian posterior, latent_channels for VQ.
    """

    def __init__(self, config: EncoderDecoderConfig, out_channels: int) -> None:
        super().__init__()
        self.unit_range = config.unit_range
        widths = [config.base_channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        in_channels = config.base_channels
        for i, width in enumerate(widths):
            attention = config.resolution_px >> i in config.attention_resolutions
            level = _Level(in_channels, width, config.num_res_blocks, attention, config.dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            in_channels = width
        self.mid = _Middle(in_channels, config)
        self.norm_out = _norm(in_channels)
        self.conv_out = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in((image + 1) / 2 if self.unit_range else image)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latent (B, config.latent_channels, h, w) -> picture (B, 3, h*f, w*f), about [-1, 1], not clamped."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.unit_range = config.unit_range
        base = config.decoder_base_channels or config.base_channels
        num_blocks = (config.decoder_res_blocks or config.num_res_blocks) + 1
        widths = [base * m for m in config.channel_mult]
        in_channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, in_channels, 3, padding=1)
        self.mid = _Middle(in_channels, config)
        levels: list[_Level] = []
        for i in reversed(range(len(widths))):
            attention = config.resolution_px >> i in config.attention_resolutions
            level = _Level(in_channels, widths[i], num_blocks, attention, config.dropout)
            if i > 0:
                level.upsample = Upsample(widths[i])
            levels.insert(0, level)
            in_channels = widths[i]
        self.up = nn.ModuleList(levels)  # counted from full resolution, run from the lowest
        self.norm_out = _norm(in_channels)
        self.conv_out = nn.Conv2d(in_channels, 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            h = level(h)
        picture = self.conv_out(F.silu(self.norm_out(h)))
        return 2 * picture - 1 if self.unit_range else picture

    @property
    def last_layer(self) -> Tensor:
        """Weight of conv_out, where the adaptive GAN weight compares gradients (2012.09841, equation 7)."""
        return self.conv_out.weight
