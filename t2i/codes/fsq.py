"""Finite scalar quantisation: each channel is rounded to one of a few levels, and their combinations are the codes
(Mentzer et al., 2309.15505)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from t2i.codes.quantizer import Quantized, Quantizer, code_counts, code_use, summed
from t2i.nn.precision import widened, without_autocast

EPSILON = 1e-3  # the outermost levels lie this share inside of what tanh can reach


class FSQ(Quantizer):
    """Channel i of `levels[i]` evenly spaced values, of odd L those of -1 .. 1 in steps of 2 / (L - 1), of even L
    -1 .. 1 - 2 / L in steps of 2 / L: 0 is always among them. Nothing is learned and nothing kept.

    Bounded as the paper's appendix A.1 does, with the half level of offset where L is even; the shift before tanh is
    atanh, which brings 0 to 0, as in vector-quantize-pytorch and Cosmos' tokenizers, where the paper's listing has tan.
    Code index: the paper's, the first channel counts fastest.
    """

    levels: Tensor
    basis: Tensor
    half_width: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.num_codes = math.prod(levels)
        self.in_channels = self.code_dim = len(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)
        # In the dtype of the weights, whatever that is changed to.
        half_width = torch.tensor([float(level // 2) for level in levels])
        self.register_buffer("half_width", half_width, persistent=False)

    def forward(self, latent: Tensor, noise: Tensor | None = None, images_seen: int = 0) -> Quantized:
        with without_autocast(latent.device):
            bounded = self._bounded(widened(latent))
            rounded = bounded.round()
            indices = self._index(rounded)
            counts = code_counts(indices, self.num_codes, bounded.dtype)
            usage, perplexity = code_use(summed(counts) if self.training else counts)
            through = bounded + (rounded - bounded).detach()
            return Quantized(
                latent=through / self.half_width.view(-1, 1, 1),
                indices=indices,
                loss=bounded.new_zeros(()),
                usage=usage,
                perplexity=perplexity,
            )

    def indices(self, latent: Tensor) -> Tensor:
        with without_autocast(latent.device):
            return self._index(self._bounded(widened(latent)).round())

    def lookup(self, indices: Tensor) -> Tensor:
        place = indices[:, None] // self.basis.view(-1, 1, 1) % self.levels.view(-1, 1, 1)
        half_width = self.half_width.view(-1, 1, 1)
        return (place - half_width) / half_width

    def _bounded(self, z: Tensor) -> Tensor:
        """tanh to (-L/2, L/2), for even L half a level lower; (B, C, h, w)."""
        levels = self.levels.view(-1, 1, 1).to(z)
        half = (levels - 1) * (1 + EPSILON) / 2
        offset = 0.5 * (levels % 2 == 0)
        return torch.tanh(z + torch.atanh(offset / half)) * half - offset

    def _index(self, rounded: Tensor) -> Tensor:
        levels = self.levels.view(-1, 1, 1)
        # What is not finite has an index too: a step that came to it is left out, not ended by an error.
        place = (rounded.nan_to_num().to(torch.int64) + levels // 2).clamp(min=0).minimum(levels - 1)
        return (place * self.basis.view(-1, 1, 1)).sum(dim=1)
