"""Normalisation layers, whose results have the dtype of what they are given: sums are in single precision in any case,
and under autocast torch would bring all of it to float32, in twice the memory."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from t2i.nn.precision import without_autocast


class GroupNorm(nn.GroupNorm):
    """Wu & He, arXiv:1803.08494."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """Ba et al., arXiv:1607.06450, with weight and bias."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich, arXiv:1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def group_norm(channels: int, eps: float = 1e-5) -> GroupNorm:
    """32 groups, or the largest smaller power of two that divides `channels`."""
    return GroupNorm(math.gcd(32, channels), channels, eps=eps)
