"""The encoder and decoder of DALL-E's discrete VAE (Ramesh et al., 2102.12092, appendix A).

Submodules carry the names of the published checkpoints. Two of their layers stand elsewhere: the encoder's last
convolution, which gives the logits of the codes, is `quant_conv` of the codec, and the weight of the decoder's first
one, which takes one of num_codes channels, is the codebook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.families.autoencoder.backbone_config import DVAEBackboneConfig
from t2i.nn.precision import widened, without_autocast
from t2i.nn.residual import Doubled

PIXEL_EPS = 0.1  # pixels in [0, 1] are mapped to [PIXEL_EPS, 1 - PIXEL_EPS] (appendix A.3)
GROUPS = 4


class ResBlock(nn.Module):
    """(B, in, h, w) -> (B, out, h, w): four convolutions after ReLUs, of `kernels`, scaled by `gain` and added to the
    (projected) input."""

    def __init__(self, in_channels: int, out_channels: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        same = in_channels == out_channels
        self.id_path = nn.Identity() if same else convolution(in_channels, out_channels, 1)
        narrow = out_channels // 4
        widths = (in_channels, narrow, narrow, narrow, out_channels)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = convolution(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class Layers(nn.ModuleList):
    """Layers in sequence, by name: a list, so that each is a block of its own to checkpointing and sharding."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class DVAEEncoder(nn.Module):
    """Picture (B, 3, H, W) in [-1, 1] -> (B, config.encoder_channels, H/8, W/8), of which the last convolution makes
    logits."""

    def __init__(self, config: DVAEBackboneConfig) -> None:
        super().__init__()
        width = config.width
        blocks: dict[str, nn.Module] = {"input": convolution(3, width, 7)}
        before = width
        for i in range(GROUPS):
            after = width << i
            group = _group(before, after, config, (3, 3, 3, 1))
            if i < GROUPS - 1:
                group.add_module("pool", nn.MaxPool2d(2))
            blocks[f"group_{i + 1}"] = group
            before = after
        self.blocks = Layers(blocks)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(self.blocks(mapped(image)))


class DVAEDecoder(nn.Module):
    """Codes (B, config.latent_channels, h, w) -> (B, 6, 8h, 8w): mu and ln b of a Laplace distribution of the mapped
    pixels' logits, three channels each.

    bias: of the first convolution, whose weight is the codebook
    """

    def __init__(self, config: DVAEBackboneConfig) -> None:
        super().__init__()
        width = config.width
        self.bias = nn.Parameter(torch.zeros(config.latent_channels))
        blocks: dict[str, nn.Module] = {}
        before = config.latent_channels
        for i in range(GROUPS):
            after = 8 * width >> i
            group = _group(before, after, config, (1, 3, 3, 3))
            if i < GROUPS - 1:
                group.add_module("upsample", Doubled())
            blocks[f"group_{i + 1}"] = group
            before = after
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=convolution(width, 6, 1)))
        self.blocks = Layers(blocks)

    @property
    def last_layer(self) -> Tensor:
        """The weight where the adaptive GAN weight compares gradients."""
        return self.blocks.output.conv.weight  # type: ignore[union-attr,return-value]

    def forward(self, latent: Tensor) -> Tensor:
        return self.blocks(latent + self.bias[:, None, None])


def _group(before: int, after: int, config: DVAEBackboneConfig, kernels: tuple[int, ...]) -> Layers:
    gain = 1 / (GROUPS * config.blocks_per_group) ** 2
    blocks = {
        f"block_{i + 1}": ResBlock(after if i else before, after, kernels, gain)
        for i in range(config.blocks_per_group)
    }
    return Layers(blocks)


class ToLogits(nn.Conv2d):
    """The encoder's last convolution, in single precision, autocast or not, as in the published code: of thousands of
    logits the largest is often ahead of the next by less than half precision tells apart."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        with without_autocast(x.device):
            x = widened(x)
            return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def convolution(
    in_channels: int, out_channels: int, kernel: int, layer: type[nn.Conv2d] = nn.Conv2d
) -> nn.Conv2d:
    """Of unit gain at the start, and without bias."""
    made = layer(in_channels, out_channels, kernel, padding=kernel // 2)
    nn.init.normal_(made.weight, std=(in_channels * kernel**2) ** -0.5)
    assert made.bias is not None
    nn.init.zeros_(made.bias)
    return made


def mapped(image: Tensor) -> Tensor:
    """Pixels in [-1, 1] -> [PIXEL_EPS, 1 - PIXEL_EPS], where a logit is finite."""
    return 0.5 + (0.5 - PIXEL_EPS) * image


def picture(statistics: Tensor) -> Tensor:
    """(B, 6, H, W) -> the picture (B, 3, H, W) at the distribution's middle; the inverse of `mapped` of sigmoid(mu)."""
    return (torch.sigmoid(statistics[:, :3]) - 0.5) / (0.5 - PIXEL_EPS)


def logit_laplace_loss(statistics: Tensor, image: Tensor) -> Tensor:
    """-ln of the logit-Laplace density (2102.12092, equation 2) of the mapped pixels, averaged over all values of the
    batch. statistics: (B, 6, H, W); image: (B, 3, H, W) in [-1, 1]"""
    mu, ln_b = statistics.chunk(2, dim=1)
    x = mapped(image)
    density = (torch.logit(x) - mu).abs() * torch.exp(-ln_b) + ln_b + torch.log(2 * x * (1 - x))
    return density.mean()
