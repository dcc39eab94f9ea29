"""The transformer that says of each code of a picture how likely it is, given the text and the codes before it.

The sequence, one slot each: the states of the L text tokens, a start, and the picture's codes by rows from the top,
each row from the left, without the last. The output at the start is of the first code, the output
at code i of code i + 1: a slot's position is that of the code which its output is of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from t2i.nn.residual import zero_init
from t2i.nn.transformer import Cache, Rotation, TokenBlock, initialise, norm_of, rotary_2d
from t2i.nn.transformer_config import TransformerConfig


class TextPrefix(nn.Module):
    """Text states as the first slots: a linear map of each, and past the end of a caption a vector of the slot's own,
    as in DALL-E (2102.12092, section 2.2), so that no slot has to be hidden."""

    def __init__(self, text_dim: int, max_tokens: int, width: int) -> None:
        super().__init__()
        self.states = nn.Linear(text_dim, width)
        self.padding = nn.Parameter(0.02 * torch.randn(max_tokens, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: (B, L, text_dim); mask: (B, L) bool, True where the caption has a token -> (B, L, width)."""
        return torch.where(mask[:, :, None], self.states(tokens), self.padding)


class CodeTransformer(nn.Module):
    """rows, columns: of the grid of codes that it is trained on
    text_dim, max_tokens: width and number of the text's states
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_codes: int,
        grid: tuple[int, int],
        text_dim: int,
        max_tokens: int,
    ) -> None:
        super().__init__()
        self.config, self.grid, width = config, grid, config.width
        rows, columns = grid
        self.text = TextPrefix(text_dim, max_tokens, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.embedding = nn.Embedding(num_codes, width)
        self.position: nn.Parameter | None = None
        if config.positions == "learned":
            self.position = nn.Parameter(0.02 * torch.randn(rows * columns, width))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TokenBlock(config) for _ in range(config.depth))
        self.norm = norm_of(config, width)
        self.head = nn.Linear(width, num_codes, bias=False)
        initialise(self, config.depth)
        zero_init(self.head)

    def forward(
        self,
        codes: Tensor,
        tokens: Tensor,
        mask: Tensor,
        places: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """codes: (B, n) int64, the first of each picture; tokens, mask: of the text, as `TextPrefix` takes them
        places: (n + 1,) int64, where in the trained grid, counted by rows, the codes 0 to n lie; None: n + 1 is the
            whole grid
        -> (B, n + 1, num_codes) logits of codes 0 to n. caches: one for each block, empty; keep what `following` needs
        """
        prefix = self.text(tokens, mask)
        if places is None:
            places = torch.arange(codes.shape[1] + 1, device=codes.device)
        start = self.start.expand(len(codes), 1, -1)
        x = torch.cat([prefix, self.placed(torch.cat([start, self.embedding(codes)], 1), places)], 1)
        return self.logits(x, self.rotation(places, prefix.shape[1]), len(places), caches)

    def following(self, code: Tensor, places: Tensor, caches: Sequence[Cache]) -> Tensor:
        """code: (B,) the newest of each picture; places: (2,) its place and the next code's; caches: of all before it
        -> (B, 1, num_codes) logits of the next code."""
        x = self.placed(self.embedding(code)[:, None], places[1:])
        rotation = None
        if (angles := self.angles(places)) is not None:
            rotation = (angles[1:], angles[:1])
        return self.logits(x, rotation, 1, caches)

    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Slots (B, n, width), each with the position of the code that its output is of."""
        return x if self.position is None else x + self.position[places]

    def angles(self, places: Tensor) -> Tensor | None:
        if self.position is not None:
            return None
        head_dim = self.config.width // self.config.heads
        return rotary_2d(*self.grid, head_dim, places.device)[places]

    def rotation(self, places: Tensor, prefix: int) -> Rotation | None:
        """Of the prefix, the start and the codes: queries turn with the place of the code which their output is of,
        keys with that of the code which they hold: what counts is how far these lie apart. Text and start stay."""
        if (angles := self.angles(places)) is None:
            return None
        still = angles.new_zeros(prefix, angles.shape[1])
        return torch.cat([still, angles]), torch.cat(
            [still, angles.new_zeros(1, angles.shape[1]), angles[:-1]]
        )

    def logits(
        self, x: Tensor, rotation: Rotation | None, last: int, caches: Sequence[Cache] | None
    ) -> Tensor:
        """x: (B, N, width) slots -> (B, last, num_codes), of the last ones."""
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x = block(x, causal=True, rotation=rotation, cache=cache)
        return self.head(self.norm(x[:, -last:]))

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between hidden layers, which Muon may step."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]
