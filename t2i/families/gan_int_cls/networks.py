"""Generator and discriminator of GAN-INT-CLS (Reed et al., 1605.05396, section 4), as their published code has them.

Where a convolution is followed by batch norm it has no bias: the published code sets all biases of convolutions to
zero before each step. Both networks work for pictures of 4 * 2^n px with n >= 2; the paper's are 64 px.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from t2i.config import check
from t2i.families.gan_int_cls.config import DiscriminatorConfig, GeneratorConfig
from t2i.nn.precision import widened

SLOPE = 0.2  # of every leaky ReLU
INIT_STD = 0.02  # of batch-normed networks (DCGAN, 1511.06434)


def num_levels(size_px: int) -> int:
    """How many times 4 px are doubled to `size_px`. Raises ConfigError for what cannot be reached so."""
    levels = round(math.log2(size_px / 4))
    check(levels >= 2 and 4 * 2**levels == size_px, "resolution.size_px", size_px, "16, 32, 64, 128, ...")
    return levels


def normed(layer: nn.Module, channels: int, norm: bool) -> list[nn.Module]:
    return [layer, nn.BatchNorm2d(channels)] if norm else [layer]


class Bottleneck(nn.Module):
    """act(x + branch(x)): 1x1 to a quarter of the channels, 3x3, 3x3 back, each but the last followed by `act`."""

    def __init__(self, channels: int, act: nn.Module, norm: bool) -> None:
        super().__init__()
        hidden = max(channels // 4, 1)
        self.act = act
        self.branch = nn.Sequential(
            *normed(nn.Conv2d(channels, hidden, 1, bias=not norm), hidden, norm),
            act,
            *normed(nn.Conv2d(hidden, hidden, 3, padding=1, bias=not norm), hidden, norm),
            act,
            *normed(nn.Conv2d(hidden, channels, 3, padding=1, bias=not norm), channels, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.branch(x))


class GeneratorNetwork(nn.Module):
    """Noise (B, noise_dim) and captions (B, pooled_dim) -> pictures (B, 3, size_px, size_px) in [-1, 1]."""

    def __init__(self, config: GeneratorConfig, pooled_dim: int, size_px: int) -> None:
        super().__init__()
        self.noise_dim = config.noise_dim
        levels = num_levels(size_px)
        text: list[nn.Module] = [nn.Linear(pooled_dim, config.text_dim)]
        text += [nn.BatchNorm1d(config.text_dim)] if config.normalise_text else []
        self.text = nn.Sequential(*text, nn.LeakyReLU(SLOPE))
        width = config.base_channels * 2 ** (levels - 1)
        first = nn.ConvTranspose2d(config.noise_dim + config.text_dim, width, 4, bias=False)
        layers = [*normed(first, width, norm=True), Bottleneck(width, nn.ReLU(), norm=True)]
        for level in range(1, levels):
            up = nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=False)
            width //= 2
            act = Bottleneck(width, nn.ReLU(), norm=True) if level == 1 else nn.ReLU()
            layers += [*normed(up, width, norm=True), act]
        layers += [nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1, bias=False), nn.Tanh()]
        self.layers = nn.ModuleList(layers)
        initialise(self)

    def forward(self, noise: Tensor, pooled: Tensor) -> Tensor:
        h = torch.cat([noise, self.text(pooled)], dim=1)[:, :, None, None]
        for layer in self.layers:
            h = layer(h)
        return h


class Discriminator(nn.Module):
    """Pictures (B, 3, size_px, size_px) in [-1, 1] and captions (B, pooled_dim) -> logits (B,): above 0 where a picture
    is real and shows its caption."""

    def __init__(self, config: DiscriminatorConfig, pooled_dim: int, size_px: int) -> None:
        super().__init__()
        levels, norm, act = num_levels(size_px), config.norm == "batch", nn.LeakyReLU(SLOPE)
        width = config.base_channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1, bias=not norm), act]
        for level in range(1, levels):
            down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=not norm)
            width *= 2
            layers += normed(down, width, norm)
            # The published code has no activation between its last two levels either; without norm they would be one.
            if level < levels - 2 or (level == levels - 2 and not norm):
                layers.append(act)
        self.layers = nn.ModuleList([*layers, Bottleneck(width, act, norm)])
        self.text = nn.Sequential(
            nn.Linear(pooled_dim, config.text_dim), nn.BatchNorm1d(config.text_dim), nn.LeakyReLU(SLOPE)
        )
        head = ConcatHead if config.head == "concat" else ProjectionHead
        self.head = head(width, config.text_dim, norm)
        if norm:
            initialise(self)

    def forward(self, image: Tensor, pooled: Tensor) -> Tensor:
        return self.judge(self.seen(image), pooled)

    def seen(self, image: Tensor) -> Tensor:
        """What is seen of a picture, whatever its caption: (B, width, 4, 4)."""
        h = image.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            h = layer(h)
        return h

    def judge(self, seen: Tensor, pooled: Tensor) -> Tensor:
        """(B,) logits, in float32 at least, of what is seen and captions (B, pooled_dim)."""
        return widened(self.head(seen, self.text(pooled)))


class ConcatHead(nn.Module):
    """The paper's: the caption's vector beside the picture's channels at each position."""

    def __init__(self, width: int, text_dim: int, norm: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *normed(nn.Conv2d(width + text_dim, width, 1, bias=not norm), width, norm),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, 1, 4, bias=not norm),
        )

    def forward(self, h: Tensor, text: Tensor) -> Tensor:
        """h: (B, width, 4, 4); text: (B, text_dim) -> (B,)."""
        everywhere = text[:, :, None, None].expand(-1, -1, *h.shape[2:])
        return self.layers(torch.cat([h, everywhere], dim=1)).flatten()


class ProjectionHead(nn.Module):
    """Miyato & Koyama's (1802.05637, equation 3) without their sum over positions: a caption says what is where."""

    def __init__(self, width: int, text_dim: int, norm: bool) -> None:
        super().__init__()
        self.unconditional = nn.Conv2d(width, 1, 4, bias=not norm)
        self.projection = nn.Linear(text_dim, width * 4 * 4)
        self.scale = (width * 4 * 4) ** -0.5

    def forward(self, h: Tensor, text: Tensor) -> Tensor:
        """h: (B, width, 4, 4); text: (B, text_dim) -> (B,)."""
        matching = (h.flatten(1) * self.projection(text)).sum(1)
        return self.unconditional(h).flatten() + self.scale * matching


def initialise(network: nn.Module) -> None:
    """Convolutions N(0, 0.02), scales of their batch norms N(1, 0.02); linear layers keep torch's."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=INIT_STD)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, mean=1.0, std=INIT_STD)
