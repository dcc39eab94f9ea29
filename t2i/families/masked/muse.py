"""Muse's transformer (Chang et al. 2301.00704, section 2.3) over picture codes."""

from __future__ import annotations

from torch import Tensor, nn

from t2i.families.masked.config import MuseConfig
from t2i.families.masked.network import MaskedTransformer
from t2i.nn.embeddings import sincos_2d
from t2i.nn.transformer import TokenBlock, initialise, norm_of, rotary_2d


class Muse(MaskedTransformer):
    """Codes attend to one another, without an order, and to the caption's token states.

    Rotary positions, with which it takes codes of other shapes than it is trained on, come with fixed ones of each
    place: where all codes are hidden, distances between them tell no place from another.
    """

    def __init__(self, config: MuseConfig, num_codes: int, shape: tuple[int, int], context_dim: int) -> None:
        super().__init__(num_codes)
        self.config = config
        width = config.width
        self.embedding = nn.Embedding(num_codes + 1, width)
        learned = config.positions == "learned"
        self.positions = (
            nn.Embedding(shape[0] * shape[1], width) if learned else nn.Linear(width, width, bias=False)
        )
        self.text = nn.Sequential(nn.Linear(context_dim, width, bias=config.bias), norm_of(config, width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([TokenBlock(config, width) for _ in range(config.depth)])
        self.norm = norm_of(config, width)
        self.to_logits = nn.Linear(width, num_codes, bias=config.bias)
        initialise(self, config.depth)

    def forward(self, tokens: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        (rows, columns), config = tokens.shape[1:], self.config
        if config.positions == "learned":
            places, rotation = self.positions.weight, None
        else:
            fixed = sincos_2d(rows, columns, config.width, device=tokens.device)
            places = self.positions(fixed.to(self.positions.weight.dtype))
            angles = rotary_2d(rows, columns, config.width // config.heads, tokens.device)
            rotation = (angles, angles)
        x, context = self.dropout(self.embedding(tokens.flatten(1)) + places), self.text(context)
        for block in self.blocks:
            x = block(x, context, context_mask, rotation=rotation)
        return self.to_logits(self.norm(x))
