"""What drawing a picture calls of the transformer, for `t2i plan`."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.builds_on import LowConfig
from t2i.nn.transformer import Cache
from t2i.planned import PlannedCalls


def planned_drawing(
    transformer: CodeTransformer, tokens: int, text_dim: int, rows: int
) -> list[PlannedCalls]:
    """One call for the text and the first code, then one for each further code, which finds the keys and values of all
    before in the caches (`drawing.draw_codes`), and the tables of the codes.

    tokens, text_dim: number and width of the text's states; rows: of the batch
    """
    config = transformer.config
    steps, cross = transformer.grid[0] * transformer.grid[1], config.conditioning == "cross"

    def first() -> Tensor:
        text, seen = torch.empty(rows, tokens, text_dim), torch.ones(rows, tokens, dtype=torch.bool)
        none, places = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        return transformer(none, text, seen, places, **planned_low(rows, transformer.low))

    def states(length: int) -> Tensor:
        return torch.empty(rows, config.heads, length, config.width // config.heads)

    def following(number: int) -> Tensor:
        """The call for code `number`, from 1 on."""
        caches = [Cache(transformer.slots_before + number + 1) for _ in transformer.blocks]
        for cache in caches:
            cache.extended(*(states(transformer.slots_before + number) for _ in range(2)))
            if cross:
                cache.context = states(tokens), states(tokens), torch.ones(rows, tokens, dtype=torch.bool)
        code, places = torch.zeros(rows, dtype=torch.int64), torch.zeros(number + 1, dtype=torch.int64)
        return transformer.following(code, places, caches)

    def numbers(codes: int) -> int:
        """Of keys and values, once so many codes are there: of text, start and codes."""
        length = transformer.slots_before + 1 + codes + cross * tokens
        return 2 * config.depth * rows * length * config.width

    calls = [PlannedCalls(1, first, first, (numbers(0), numbers(0)))]
    if steps > 1:
        ends = numbers(1), numbers(steps - 1)
        calls.append(PlannedCalls(steps - 1, lambda: following(1), lambda: following(steps - 1), ends, first))
    return calls


def planned_low(batch: int, low: LowConfig | None) -> dict[str, Tensor]:
    """The codes at the lower resolution, as `CodeTransformer.forward` takes them."""
    return {} if low is None else {"low": torch.zeros(batch, low.side, low.side, dtype=torch.int64)}
