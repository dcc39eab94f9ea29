"""Codes on a transformer's way in and out, known by their vectors in the codec's codebook too.

A table has nothing in common between codes that look alike: what is learned of one says nothing of the other. A network
that is given their vectors knows (MaskBit, 2409.16211, section 3.2, which has no table at all).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.nn.once import once


class FromVectors(nn.Module):
    """A vector of `width` for each code, by one hidden layer from its own in the codebook.

    vectors: buffer (num_codes, code_dim), zero until `take`
    std: of the last layer at the start
    """

    vectors: Tensor

    def __init__(self, num_codes: int, code_dim: int, width: int, std: float) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_codes, code_dim))
        # Not nn.Linear, which transformers start smaller: the vectors have few numbers.
        self.hidden = nn.Parameter(0.5 * torch.randn(width, code_dim))
        self.bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Parameter(std * torch.randn(width, width))

    def take(self, vectors: Tensor) -> None:
        """(num_codes, code_dim), the codebook's; kept with mean 0 and variance 1 of each number."""
        std = vectors.std(0, correction=0).clamp_min(1e-6)
        self.vectors.copy_((vectors - vectors.mean(0)) / std)

    def forward(self) -> Tensor:
        """-> (num_codes, width)"""
        return F.linear(F.gelu(F.linear(self.vectors, self.hidden, self.bias)), self.out)


class CodeEmbedding(nn.Embedding):
    """(...) int64 -> (..., width): a row of the table, and for the first num_codes rows what their vectors give."""

    def __init__(self, rows: int, num_codes: int, code_dim: int, width: int) -> None:
        super().__init__(rows, width)
        self.of_vectors = FromVectors(num_codes, code_dim, width, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, once(self.table))

    def table(self) -> Tensor:
        """-> (rows, width)"""
        given = self.of_vectors()
        return self.weight + F.pad(given, (0, 0, 0, len(self.weight) - len(given)))


class CodeHead(nn.Linear):
    """(..., width) -> (..., num_codes) logits: products with a row for each code, and with what its vector gives."""

    def __init__(self, num_codes: int, code_dim: int, width: int, bias: bool) -> None:
        super().__init__(width, num_codes, bias)
        self.of_vectors = FromVectors(num_codes, code_dim, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, once(self.table), self.bias)

    def table(self) -> Tensor:
        """-> (num_codes, width)"""
        return self.weight + self.of_vectors()


def code_embedding(rows: int, num_codes: int, code_dim: int | None, width: int) -> nn.Embedding:
    """A table of `rows`, the first of which are codes; code_dim: of their vectors, None where these are not given."""
    return nn.Embedding(rows, width) if code_dim is None else CodeEmbedding(rows, num_codes, code_dim, width)


def code_head(num_codes: int, code_dim: int | None, width: int, bias: bool) -> nn.Linear:
    """Logits of the codes; code_dim as in `code_embedding`."""
    return (
        nn.Linear(width, num_codes, bias) if code_dim is None else CodeHead(num_codes, code_dim, width, bias)
    )


def take_vectors(transformer: nn.Module, vectors: Tensor) -> None:
    """Gives a transformer its codebook's vectors, (num_codes, code_dim), where it is made for them."""
    for module in transformer.modules():
        if isinstance(module, FromVectors):
            module.take(vectors)
