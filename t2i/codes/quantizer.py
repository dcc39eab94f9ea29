"""What all quantisers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """What a quantiser makes of a batch.

    latent: (B, D, h, w) the codes; its gradient passes straight through to the encoder's output
    indices: (B, h, w) int64
    loss: scalar, weighted, to be added to the reconstruction's
    usage: scalar in [0, 1], share of the codes that this batch uses
    perplexity: scalar in [1, num_codes], exp of the entropy of the codes' use
    metrics: further scalars to log
    """

    latent: Tensor
    indices: Tensor
    loss: Tensor
    usage: Tensor
    perplexity: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """Replaces each position's vector by one of finitely many codes. Works in float32 at least, autocast or not.

    num_codes: indices are whole numbers from 0 up to, not including, this
    in_channels: C, of what is quantised
    code_dim: D, of a code
    needs_noise: whether training draws
    """

    num_codes: int
    in_channels: int
    code_dim: int
    needs_noise: bool = False

    @abstractmethod
    def forward(self, latent: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Quantized:
        """latent: (B, C, h, w) float. Under torch.distributed a training step counts the codes of all ranks.

        noise: (B, C, h, w), uniform in [0, 1), for those that draw, while training
        images_seen: by the run, for those whose weights change with it
        """

    @abstractmethod
    def indices(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) float -> (B, h, w) int64; learns nothing."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, num_codes) -> (B, D, h, w)."""


def code_counts(indices: Tensor, num_codes: int, dtype: torch.dtype) -> Tensor:
    """How often each code comes, (num_codes,)."""
    # Not torch.bincount: on a GPU that makes the host wait.
    ones = torch.ones(indices.numel(), dtype=dtype, device=indices.device)
    return torch.zeros(num_codes, dtype=dtype, device=indices.device).index_add_(0, indices.flatten(), ones)


def summed(tensor: Tensor) -> Tensor:
    """In place, over the ranks where there are several."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def code_use(counts: Tensor) -> tuple[Tensor, Tensor]:
    """usage and perplexity, as Quantized has them."""
    use = counts / counts.sum()
    return (counts > 0).to(use).mean(), torch.special.entr(use).sum().exp()


def entropy(share: Tensor) -> Tensor:
    """Scalar in nats, of (K,) shares that sum to 1; with a gradient where one is 0 to the last digit, which
    torch.special.entr has not."""
    return -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum()


def mean_share(share: Tensor, training: bool) -> Tensor:
    """(N, K) -> (K,), the mean over positions, in training those of all ranks. Its gradient is that of this rank's own
    mean: DDP averages them."""
    mean = share.mean(dim=0)
    if not (training and dist.is_available() and dist.is_initialized()):
        return mean
    return mean + (summed(mean.detach().clone()) / dist.get_world_size() - mean).detach()
