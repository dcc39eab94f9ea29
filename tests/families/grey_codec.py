"""A codec of grey squares: what a picture of codes looks like is known without training."""

from __future__ import annotations

import torch
from torch import nn

from t2i.interfaces import TokenCodec


class GreyCodec(TokenCodec):
    """Code k is a square of one grey, from -0.8 to 0.8; the nearest grey to a square's mean is its code."""

    latent_channels = 1

    def __init__(self, num_codes: int = 5, downsampling: int = 8) -> None:
        super().__init__()
        self.num_codes, self.downsampling = num_codes, downsampling
        self.register_buffer("greys", torch.linspace(-0.8, 0.8, num_codes))

    def moments(self, image):
        return nn.functional.avg_pool2d(image, self.downsampling).mean(1, keepdim=True)

    def latent(self, moments, noise=None):
        return moments

    def tokens(self, image):
        return (self.moments(image)[:, 0, ..., None] - self.greys).abs().argmin(-1)

    def decode_tokens(self, tokens):
        return self.decode(self.greys[tokens][:, None])

    def decode(self, latent):
        return (
            latent.repeat_interleave(self.downsampling, 2)
            .repeat_interleave(self.downsampling, 3)
            .expand(-1, 3, -1, -1)
        )

    def encoding_weights(self):
        return {}

    def token_weights(self):
        return {"greys": self.greys}

    def code_vectors(self):
        return self.greys[:, None]
