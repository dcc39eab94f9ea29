"""Normalisation layers."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """32 groups (Wu & He, arXiv:1803.08494), or the largest smaller power of two that divides `channels`."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich, arXiv:1910.07467), in the dtype of x: under
    autocast a weight of another dtype would cost the fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
