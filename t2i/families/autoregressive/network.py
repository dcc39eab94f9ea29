"""The transformer that says of each code of a picture how likely it is, given the text and the codes before it.

The sequence, one slot each: the states of the L text tokens (none where blocks attend to the text instead), in
super-resolution the codes at the lower resolution, a start, and the picture's codes by rows from the top, each row from
the left, without the last. The output at the start is of the first code, the output at code i of code i + 1: a slot's
position is that of the code which its output is of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.codes.embedding import code_embedding, code_head
from t2i.families.autoregressive.config import NetworkConfig
from t2i.families.autoregressive.masks import axial_mask, pattern_of
from t2i.families.autoregressive.words import WordPrefix
from t2i.families.builds_on import LowConfig
from t2i.nn.precision import widened
from t2i.nn.residual import zero_init
from t2i.nn.transformer import Cache, Rotation, TokenBlock, initialise, norm_of, rotary_2d


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
    """grid: rows and columns of codes that it is trained on
    text_dim, max_tokens: width and number of the text's states
    low: of the codes at the lower resolution, where it is given such. Raises ConfigError where the grid's sides are no
        multiples of theirs
    code_dim: of the codes' vectors, which config.code_vectors asks for
    """

    def __init__(
        self,
        config: NetworkConfig,
        num_codes: int,
        grid: tuple[int, int],
        text_dim: int,
        max_tokens: int,
        low: LowConfig | None = None,
        code_dim: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.grid, width = config, grid, config.width
        is_prefix = config.conditioning != "cross"
        self.text: TextPrefix | WordPrefix | None = None
        if config.conditioning == "prefix":
            self.text = TextPrefix(text_dim, max_tokens, width)
        if config.conditioning == "words":
            self.text = WordPrefix(config.vocabulary, max_tokens, width)
        self.text_slots = max_tokens if is_prefix else 0
        self.low, self.low_slots = low, 0
        if low is not None:
            low.check_side(grid[0])
            self.low_slots = low.side**2
            self.low_embedding = nn.Embedding(low.num_codes, width)
            if config.positions == "learned":
                self.low_position = nn.Parameter(0.02 * torch.randn(self.low_slots, width))
        self.start = nn.Parameter(0.02 * torch.randn(width))
        vector_dim = code_dim if config.code_vectors else None
        self.embedding = code_embedding(num_codes, num_codes, vector_dim, width)
        self.position: nn.Parameter | None = None
        if config.positions == "learned":
            self.position = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], width))
        self.dropout = nn.Dropout(config.dropout)
        context_width = None if is_prefix else text_dim
        self.blocks = nn.ModuleList(TokenBlock(config, context_width) for _ in range(config.depth))
        self.norm = norm_of(config, width)
        self.head = code_head(num_codes, vector_dim, width, bias=False)
        initialise(self, config.depth)
        zero_init(self.head)

    def forward(
        self,
        codes: Tensor,
        tokens: Tensor,
        mask: Tensor,
        places: Tensor | None = None,
        caches: Sequence[Cache] | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """codes: (B, n) int64, the first of each picture; tokens, mask: of the text, as `TextPrefix` takes them; low:
        (B, side, side) int64, of each picture at the lower resolution
        places: (n + 1,) int64, where in the trained grid, counted by rows, the codes 0 to n lie; None: n + 1 is the
            whole grid
        -> (B, n + 1, num_codes) logits of codes 0 to n. caches: one for each block, empty; keep what `following` needs
        """
        if places is None:
            places = torch.arange(codes.shape[1] + 1, device=codes.device)
        states = self.states(self.slots(codes, tokens, mask, places, low), places, 0, caches, tokens, mask)
        return self.head(self.norm(states[:, -len(places) :]))

    def losses(
        self, codes: Tensor, tokens: Tensor, mask: Tensor, low: Tensor | None = None
    ) -> dict[str, Tensor]:
        """codes: (B, N), all of each picture -> "codes", scalar: the mean of -log p of each, given those before it; and
        where the text is words "text", likewise. low: as `forward` takes it"""
        places = torch.arange(codes.shape[1], device=codes.device)
        slots = self.slots(codes[:, :-1], tokens, mask, places, low)
        states = self.states(slots, places, 0, None, tokens, mask)
        logits = widened(self.head(self.norm(states[:, -len(places) :])))
        losses = {"codes": F.cross_entropy(logits.flatten(0, 1), codes.flatten())}
        if isinstance(self.text, WordPrefix):
            losses["text"] = self.text.loss(self.norm(states[:, : self.text_slots]), tokens, mask)
        return losses

    def slots(
        self, codes: Tensor, tokens: Tensor, mask: Tensor, places: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """All of them, (B, L + side^2 + 1 + n, width)."""
        start = self.start.expand(len(codes), 1, -1)
        parts = [self.placed(torch.cat([start, self.embedding(codes)], 1), places)]
        if self.low is not None:
            assert low is not None
            x = self.low_embedding(low.flatten(1))
            parts.insert(0, x if self.position is None else x + self.low_position)
        if self.text is not None:
            parts.insert(0, self.text(tokens, mask))
        return torch.cat(parts, 1)

    def following(self, code: Tensor, places: Tensor, caches: Sequence[Cache]) -> Tensor:
        """code: (B,) the newest of each picture, code n - 1; places: (n + 1,) as in `forward`; caches: of all before it
        -> (B, 1, num_codes) logits of code n."""
        x = self.placed(self.embedding(code)[:, None], places[-1:])
        states = self.states(x, places, self.slots_before + len(places) - 1, caches)
        return self.head(self.norm(states))

    @property
    def slots_before(self) -> int:
        """The start."""
        return self.text_slots + self.low_slots

    def placed(self, x: Tensor, places: Tensor) -> Tensor:
        """Slots (B, n, width), each with the position of the code that its output is of."""
        return x if self.position is None else x + self.position[places]

    def states(
        self,
        x: Tensor,
        places: Tensor,
        first: int,
        caches: Sequence[Cache] | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """x: (B, N, width), slots first to first + N - 1 of all before, the start and the codes that lie at places[:-1]
        -> as x, after the blocks. context, context_mask: the text, which is attended to where it has no slots"""
        rotation, masks = self.rotation(places, first), self.masks(places, first)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            mask = masks.get(pattern_of(i, len(self.blocks)))
            x = block(x, context, context_mask, mask, mask is None, rotation, cache)
        return x

    def rotation(self, places: Tensor, first: int) -> Rotation | None:
        """Queries turn with the place of the code which their output is of, keys with that of the code which they hold:
        what counts is how far these lie apart. Text and start stay; codes at the lower resolution lie in the middle of
        those which they cover."""
        if self.position is not None:
            return None
        grid = rotary_2d(*self.grid, self.config.width // self.config.heads, places.device)
        angles, before = grid[places], [grid.new_zeros(self.text_slots, grid.shape[1])]
        if self.low is not None:
            covered = grid.view(
                self.low.side, self.grid[0] // self.low.side, self.low.side, -1, grid.shape[1]
            )
            before.append(covered.mean((1, 3)).flatten(0, 1))
        queries = torch.cat([*before, angles])
        keys = torch.cat([*before, angles.new_zeros(1, angles.shape[1]), angles[:-1]])
        return queries[first:], keys[first:]

    def masks(self, places: Tensor, first: int) -> dict[str, Tensor]:
        """By pattern, of the slots from `first` on; none where each slot sees all before it."""
        if self.config.attention == "full":
            return {}
        held = torch.cat([places.new_full((self.slots_before + 1,), -1), places[:-1]])
        patterns = {pattern_of(i, len(self.blocks)) for i in range(len(self.blocks))}
        return {each: axial_mask(each, held[first:], held, self.grid[1], first) for each in patterns}

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The weights between hidden layers, which Muon may step."""
        return [p for p in self.blocks.parameters() if p.ndim == 2]
