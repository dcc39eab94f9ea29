"""Muse's transformer (Chang et al. 2301.00704, sections 2.3 and 2.4) over picture codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.codes.embedding import code_embedding, code_head
from t2i.families.masked.config import MaskedLowConfig, MuseConfig
from t2i.families.masked.network import MaskedTransformer
from t2i.nn.embeddings import sincos_2d
from t2i.nn.once import once
from t2i.nn.transformer import Rotation, TokenBlock, initialise, norm_of, rotary_2d


class Places(nn.Module):
    """Codes of a grid as vectors, each with its place, and what attention is told of places.

    Rotary positions, with which it takes other shapes than it is trained on, come with fixed ones of each place: where
    all codes are hidden, distances between them tell no place from another.
    """

    def __init__(self, config: MuseConfig, embedding: nn.Embedding, shape: tuple[int, int]) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.embedding = embedding
        learned = config.positions == "learned"
        count = shape[0] * shape[1]
        self.positions = nn.Embedding(count, width) if learned else nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Rotation | None]:
        """(B, h, w) int64 -> (B, h w, width)."""
        (rows, columns), config = tokens.shape[1:], self.config
        x = self.embedding(tokens.flatten(1))
        if config.positions == "learned":
            return x + self.positions.weight, None
        fixed = sincos_2d(rows, columns, config.width, device=tokens.device)
        angles = rotary_2d(rows, columns, config.width // config.heads, tokens.device)
        return x + self.positions(fixed.to(self.positions.weight.dtype)), (angles, angles)


class Muse(MaskedTransformer):
    """Codes attend to one another, without an order, and to the caption's token states; in super-resolution also to the
    codes at the lower resolution, which have attended to one another.

    shape: (h, w) of the codes that it is trained on. Raises ConfigError where `low` has sides that do not divide them
    code_dim: of the codes' vectors, which config.code_vectors asks for
    """

    def __init__(
        self,
        config: MuseConfig,
        num_codes: int,
        shape: tuple[int, int],
        context_dim: int,
        low: MaskedLowConfig | None = None,
        code_dim: int = 0,
    ) -> None:
        super().__init__(num_codes, config.positions == "rotary")
        width = config.width
        vector_dim = code_dim if config.code_vectors else None
        self.places = Places(config, code_embedding(num_codes + 1, num_codes, vector_dim, width), shape)
        self.text = nn.Sequential(nn.Linear(context_dim, width, bias=config.bias), norm_of(config, width))
        self.low_places: Places | None = None
        if low is not None:
            low.check_side(shape[0])
            self.low_places = Places(config, nn.Embedding(low.num_codes, width), (low.side, low.side))
            self.low_blocks = nn.ModuleList([TokenBlock(config) for _ in range(low.depth)])
            self.low_norm = norm_of(config, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([TokenBlock(config, width) for _ in range(config.depth)])
        self.norm = norm_of(config, width)
        self.to_logits = code_head(num_codes, vector_dim, width, config.bias)
        initialise(self, config.depth)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        context_mask: Tensor,
        low: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        x, rotation = self.places(tokens)
        x, context = self.dropout(x), once(self.text, context)
        if low is not None:
            context = once(self.with_low, context, low)
            context_mask = F.pad(context_mask, (0, context.shape[1] - context_mask.shape[1]), value=True)
        for block in self.blocks:
            x = block(x, context, context_mask, rotation=rotation)
        return self.to_logits(self.norm(x))

    def with_low(self, text: Tensor, low: Tensor) -> Tensor:
        """(B, L, width) and (B, side, side) -> (B, L + side^2, width), what the blocks attend to."""
        assert self.low_places is not None
        seen, rotation = self.low_places(low)
        for block in self.low_blocks:
            seen = block(seen, rotation=rotation)
        return torch.cat([text, self.low_norm(seen)], dim=1)
