"""A codec without a network: pixels as the nearest colours of a palette (ImageGPT, Chen et al. 2020, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from t2i.families.autoregressive.config import PALETTE_PIXELS
from t2i.interfaces import TokenCodec
from t2i.nn.precision import without_autocast

ITERATIONS = 20


class PaletteCodec(TokenCodec):
    """colours: buffer (num_codes, 3) in [-1, 1]; black until `fit`"""

    colours: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.num_codes, self.downsampling, self.latent_channels = num_codes, 1, 3
        self.register_buffer("colours", torch.full((num_codes, 3), -1.0))

    @torch.no_grad()
    def fit(self, images: Iterable[Tensor]) -> None:
        """Sets the colours to the k-means of pictures' pixels (Lloyd's algorithm). images: (B, 3, H, W) in [-1, 1]"""
        pixels = torch.cat([image.movedim(1, -1).flatten(0, 2) for image in images])
        chosen = torch.Generator().manual_seed(0)
        pixels = pixels[torch.randperm(len(pixels), generator=chosen)[:PALETTE_PIXELS]]
        distinct = pixels.unique(dim=0)
        first = torch.randperm(len(distinct), generator=chosen)[: self.num_codes]
        means = distinct[first]
        for _ in range(ITERATIONS):
            own = torch.cdist(pixels, means).argmin(1)
            count = torch.bincount(own, minlength=len(means))[:, None]
            total = torch.zeros_like(means).index_add_(0, own, pixels)
            means = torch.where(count > 0, total / count.clamp(min=1), means)
        self.colours[: len(means)] = means.to(self.colours)

    def moments(self, image: Tensor) -> Tensor:
        return image

    def latent(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return moments

    def decode(self, latent: Tensor) -> Tensor:
        return self.decode_tokens(self.tokens(latent))

    def encoding_weights(self) -> Mapping[str, Tensor]:
        return {}

    def token_weights(self) -> Mapping[str, Tensor]:
        return {"colours": self.colours}

    def code_vectors(self) -> Tensor:
        return self.colours

    def tokens(self, image: Tensor) -> Tensor:
        pixels = image.movedim(1, -1)
        with without_autocast(image.device):
            # ||p - c||^2 less ||p||^2, which is the same for all colours.
            distance = self.colours.square().sum(1) - 2 * pixels @ self.colours.T
            return distance.argmin(-1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        return self.colours[tokens].movedim(-1, 1)
