"""The transformer encoder and decoder of ViT-VQGAN (Yu et al., 2110.04627, section 3.1): plain ViTs (Dosovitskiy et
al., 2010.11929) over patches, without a class token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.autoencoder.backbone_config import ViTBackboneConfig, ViTConfig
from t2i.nn.attention import Attention
from t2i.nn.embeddings import sincos_2d


class ViTBlock(nn.Module):
    """(B, N, width) -> the same: attention and an MLP of 4 * width, each after a norm and added to its input."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads=config.num_heads, head_dim=config.head_dim)
        self.norm2 = nn.LayerNorm(width)
        activation = nn.Tanh() if config.activation == "tanh" else nn.GELU()
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """(B, width, h, w) -> the same, after learned positions, `depth` blocks and a norm.

    Positions start as sines and cosines of the row and the column.
    side: positions along each side of a training picture; others are interpolated, as ViT does (section 3.2)
    """

    def __init__(self, config: ViTConfig, side: int) -> None:
        super().__init__()
        start = sincos_2d(side, side, config.width).to(torch.get_default_dtype())
        self.positions = nn.Parameter(start.T.reshape(1, config.width, side, side))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        positions: Tensor = self.positions
        if x.shape[2:] != positions.shape[2:]:
            positions = F.interpolate(positions, size=x.shape[2:], mode="bicubic", align_corners=False)
        tokens = (x + positions).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens).transpose(1, 2).reshape(x.shape)


class ViTEncoder(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] -> (B, width, H/f, W/f), f = config.patch_px."""

    def __init__(self, config: ViTBackboneConfig) -> None:
        super().__init__()
        patch = config.patch_px
        self.unit_range = config.unit_range
        self.patches = nn.Conv2d(3, config.encoder.width, patch, stride=patch)
        self.transformer = ViT(config.encoder, config.resolution_px // patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.transformer(self.patches((image + 1) / 2 if self.unit_range else image))


class ViTDecoder(nn.Module):
    """(B, width, h, w) -> picture (B, 3, h*f, w*f), about [-1, 1], not clamped."""

    def __init__(self, config: ViTBackboneConfig) -> None:
        super().__init__()
        patch = config.patch_px
        self.unit_range = config.unit_range
        self.transformer = ViT(config.decoder, config.resolution_px // patch)
        self.pixels = nn.ConvTranspose2d(config.decoder.width, 3, patch, stride=patch)

    @property
    def last_layer(self) -> Tensor:
        """The weight where the adaptive GAN weight compares gradients."""
        return self.pixels.weight

    def forward(self, latent: Tensor) -> Tensor:
        picture = self.pixels(self.transformer(latent))
        return 2 * picture - 1 if self.unit_range else picture
