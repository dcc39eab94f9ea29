"""What drawing a picture calls of the transformer, for `t2i plan`."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.families.autoregressive.network import CodeTransformer
from t2i.nn.transformer import Cache
from t2i.planned import PlannedCalls


def planned_drawing(
    transformer: CodeTransformer, tokens: int, text_dim: int, rows: int
) -> list[PlannedCalls]:
    """One call for the text and the first code, then one for each further code, which finds the keys and values of all
    before in the caches (`drawing.draw_codes`).

    tokens, text_dim: number and width of the text's states; rows: of the batch
    """
    config = transformer.config
    head_dim, steps = config.width // config.heads, transformer.grid[0] * transformer.grid[1]

    def caches(length: int) -> list[Cache]:
        made = [Cache(length + 1) for _ in transformer.blocks]
        for cache in made:
            for _ in range(length > 0):
                cache.extended(*(torch.empty(rows, config.heads, length, head_dim) for _ in range(2)))
        return made

    def first() -> Tensor:
        text = torch.empty(rows, tokens, text_dim)
        seen = torch.ones(rows, tokens, dtype=torch.bool)
        places = torch.zeros(1, dtype=torch.int64)
        return transformer(torch.zeros(rows, 0, dtype=torch.int64), text, seen, places)

    def following(before: int) -> Tensor:
        code, places = torch.zeros(rows, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        return transformer.following(code, places, caches(before))

    def numbers(length: int) -> int:
        """Of keys and values."""
        return 2 * config.depth * rows * length * config.width

    start = tokens + 1  # the slots of the first call
    calls = [PlannedCalls(1, first, first, (numbers(start), numbers(start)))]
    if steps > 1:
        found = numbers(start + 1), numbers(start + steps - 1)
        last = start + steps - 2
        calls.append(PlannedCalls(steps - 1, lambda: following(start), lambda: following(last), found))
    return calls
