"""Super-resolution of a decoder's pictures by convolutions, as Parti has it behind its tokenizer (2206.10789): WDSR-A
(1808.08718), without its weight normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.autoencoder.config import UpsamplerConfig
from t2i.nn.residual import zero_init

EXPANSION = 4  # of a block's channels before its activation
SKIP = 5  # side of the kernel that enlarges by itself; that of bicubic enlargement fits into it


class WideBlock(nn.Module):
    """x + conv(relu(conv(x))), wider in between (1808.08718, section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, EXPANSION * channels, 3, padding=1)
        self.narrow = nn.Conv2d(EXPANSION * channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.wide(x)))


class Upsampler(nn.Module):
    """(B, 3, H, W) -> (B, 3, factor*H, factor*W). Starts as bicubic enlargement: the blocks add nothing yet."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.factor, out_channels = config.factor, 3 * config.factor**2
        self.head = nn.Conv2d(3, config.channels, 3, padding=1)
        self.blocks = nn.ModuleList(WideBlock(config.channels) for _ in range(config.blocks))
        self.tail = nn.Conv2d(config.channels, out_channels, 3, padding=1)
        zero_init(self.tail)
        self.skip = nn.Conv2d(3, out_channels, SKIP, padding=SKIP // 2)
        with torch.no_grad():
            self.skip.weight.copy_(bicubic_kernels(config.factor))
        nn.init.zeros_(self.skip.bias)  # type: ignore[arg-type]

    @property
    def last_layer(self) -> Tensor:
        return self.tail.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        for block in self.blocks:
            h = block(h)
        return F.pixel_shuffle(self.tail(h) + self.skip(x), self.factor)


def bicubic_kernels(factor: int) -> Tensor:
    """(3 factor^2, 3, 5, 5): of a convolution before a pixel shuffle, which together enlarge as `F.interpolate` does:
    what each of the pixels around one gives to the pixels that it becomes."""
    impulses = torch.eye(SKIP**2).view(SKIP**2, 1, SKIP, SKIP)
    enlarged = F.interpolate(impulses, scale_factor=factor, mode="bicubic")
    middle = slice(SKIP // 2 * factor, (SKIP // 2 + 1) * factor)
    kernels = enlarged[:, 0, middle, middle].permute(1, 2, 0).reshape(factor**2, SKIP, SKIP)
    return torch.einsum("fyx,ck->cfkyx", kernels, torch.eye(3)).flatten(0, 1)
