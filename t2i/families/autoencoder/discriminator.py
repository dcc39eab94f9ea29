"""The patch discriminator (Isola et al., 1611.07004) of VQGAN and latent diffusion."""

from __future__ import annotations

from torch import Tensor, nn

from t2i.nn.norm import group_norm
from t2i.nn.precision import widened


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits (B, 1, h, w), one per patch, in float32 at least.

    Patches overlap, and are 70 px wide for 3 layers. H and W are 3 * 2^num_layers px or more. Normalised by
    GroupNorm where the paper has BatchNorm: its statistics belong to one picture, so they are the same
    whatever the number of processes or the batch, and real and fake pictures may share a pass. Convolutions
    start as N(0, 0.02) (1611.07004, section 6.2).
    """

    def __init__(self, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        first = nn.Conv2d(3, base_channels, 4, stride=2, padding=1)
        layers: list[nn.Module] = [first, nn.LeakyReLU(0.2)]
        width = base_channels
        for i in range(1, num_layers + 1):
            next_width = base_channels * min(2**i, 8)
            layers += [
                nn.Conv2d(width, next_width, 4, stride=2 if i < num_layers else 1, padding=1, bias=False),
                group_norm(next_width),
                nn.LeakyReLU(0.2),
            ]
            width = next_width
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        return widened(self.layers(image))
