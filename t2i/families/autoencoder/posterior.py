"""The diagonal Gaussian posterior of a KL autoencoder (Kingma & Welling, 1312.6114, appendix B)."""

from __future__ import annotations

import torch
from torch import Tensor


class DiagonalGaussian:
    """q(z|x) = N(mean, exp(logvar)), every element independent.

    moments: (B, 2C, h, w), mean and log variance along the channels. The log variance is clamped to
    [-30, 20] (2112.10752's code). Half-precision moments are widened to float32: exp and the sum of the KL
    need it.
    """

    def __init__(self, moments: Tensor) -> None:
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w), reparameterised: gradients reach the moments. The noise is drawn on the device of
        `generator`, so that a CPU generator gives the same latent on every device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.sample_with(noise.to(self.mean.device))

    def sample_with(self, noise: Tensor | None) -> Tensor:
        """(B, C, h, w): mean + std * noise, noise ~ N(0, I) of that shape; the mode where it is None."""
        return self.mean if noise is None else self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """(B, C, h, w), the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """(B,) KL(q || N(0, I)) in nats, summed over C, h and w."""
        kl = 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)
        return kl.flatten(1).sum(dim=1)
