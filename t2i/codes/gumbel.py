"""Gumbel-softmax codes of DALL-E's discrete VAE (Ramesh et al., 2102.12092, section 2.1; Jang et al., 1611.01144)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.codes.quantizer import Quantized, Quantizer, code_counts, code_use, summed
from t2i.nn.precision import widened, without_autocast


class GumbelCodes(Quantizer):
    """Takes logits of the codes, C = num_codes. In training the latent is the mean of all codes under a sample of the
    relaxed one-hot distribution, softmax((logits + Gumbel noise) / temperature); without noise the likeliest code.

    The loss is KL(softmax(logits) || uniform) in nats, averaged over the positions, times kl_weight.

    kl_warmup_images: the weight grows to kl_weight over so many pictures
    start_temperature, end_temperature, anneal_images: the temperature falls over so many pictures; both change as half
        a cosine (2102.12092, appendix A.2)
    """

    needs_noise = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        kl_weight: float,
        kl_warmup_images: int = 0,
        start_temperature: float = 1.0,
        end_temperature: float = 1 / 16,
        anneal_images: int = 0,
    ) -> None:
        super().__init__()
        self.num_codes, self.in_channels, self.code_dim = num_codes, num_codes, code_dim
        self.kl_weight, self.kl_warmup_images = kl_weight, kl_warmup_images
        self.start_temperature, self.end_temperature = start_temperature, end_temperature
        self.anneal_images = anneal_images
        self.codes = nn.Parameter(torch.randn(num_codes, code_dim))

    def forward(self, latent: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Quantized:
        """noise: (B, num_codes, h, w), uniform in [0, 1)"""
        temperature = self.temperature(images_seen)
        with without_autocast(latent.device):
            logits = widened(latent)
            indices = logits.argmax(dim=1)
            if noise is None:
                codes = self.lookup(indices)
            else:
                uniform = noise.to(logits).clamp_min(torch.finfo(logits.dtype).tiny)
                share = torch.softmax((logits - torch.log(-torch.log(uniform))) / temperature, dim=1)
                codes = torch.einsum("bkhw,kd->bdhw", share, self.codes.to(share))
            log_q = torch.log_softmax(logits, dim=1)
            kl = (log_q.exp() * (log_q + math.log(self.num_codes))).sum(dim=1).mean()
            counts = code_counts(indices, self.num_codes, logits.dtype)
            usage, perplexity = code_use(summed(counts) if self.training else counts)
            return Quantized(
                latent=codes,
                indices=indices,
                loss=self.kl_weight * risen(images_seen, self.kl_warmup_images) * kl,
                usage=usage,
                perplexity=perplexity,
                metrics={"kl": kl.detach(), "temperature": kl.new_full((), temperature)},
            )

    def indices(self, latent: Tensor) -> Tensor:
        return latent.argmax(dim=1)

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codes).movedim(-1, 1)

    def temperature(self, images_seen: int) -> float:
        """After so many training pictures."""
        share = risen(images_seen, self.anneal_images)
        return self.start_temperature + (self.end_temperature - self.start_temperature) * share


def risen(images_seen: int, images: int) -> float:
    """From 0 to 1 over so many pictures, as half a cosine."""
    return 1.0 if images_seen >= images else 0.5 * (1.0 - math.cos(math.pi * images_seen / images))
