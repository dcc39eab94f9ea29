"""Pictures' codes, drawn one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2i.codes.config import CodeSampling
from t2i.codes.sampling import drawn
from t2i.families.autoregressive.network import CodeTransformer
from t2i.interfaces import Progress, TextFeatures
from t2i.nn.guidance import both_texts, guided
from t2i.nn.once import weights_unchanged
from t2i.nn.precision import widened
from t2i.nn.transformer import Cache


def window_starts(size: int, window: int) -> list[int]:
    """For each place of a side of `size`, where the window of the trained length begins in which it is drawn: the place
    is in the window's middle, but at the ends (2012.09841, section 3.3)."""
    return [min(max(i - window // 2, 0), max(size - window, 0)) for i in range(size)]


@weights_unchanged()
def draw_codes(
    transformer: CodeTransformer,
    text: TextFeatures,
    negative: TextFeatures | None,
    grid: tuple[int, int],
    generators: Sequence[torch.Generator],
    sampling: CodeSampling,
    progress: Progress | None = None,
    low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(N, rows, columns) int64 codes of N pictures, on the transformer's device, and (N,) bool: whether all numbers on
    the way were finite. Beyond the trained grid each code is drawn in a window of that size around it.

    negative: the text of the unconditional half, or None without guidance
    generators: one for each picture, on the CPU, which gives a number for each of its codes
    low: (N, side, side) int64, with super-resolution: the pictures' codes at the lower one; `grid` is the trained one
    """
    rows, columns = grid
    steps, device = rows * columns, text.tokens.device
    uniform = torch.stack([torch.rand(steps, generator=each) for each in generators]).to(device)
    both = text if negative is None else both_texts(negative, text)
    tops, lefts = window_starts(rows, transformer.grid[0]), window_starts(columns, transformer.grid[1])
    covers = rows <= transformer.grid[0] and columns <= transformer.grid[1]
    caches = [Cache(transformer.slots_before + steps) for _ in transformer.blocks] if covers else None
    codes = torch.zeros(len(generators), rows, columns, dtype=torch.int64, device=device)
    finite = torch.ones(len(generators), dtype=torch.bool, device=device)
    for i in range(steps):
        row, column = divmod(i, columns)
        before, places = seen(codes, row, column, tops[row], lefts[column], transformer.grid)
        if caches is not None and i > 0:
            logits = transformer.following(twice(before[:, -1], both), places, caches)[:, -1]
        else:
            seen_low = None if low is None else twice(low, both)
            given = twice(before, both), both.tokens, both.mask
            logits = transformer(*given, places, caches, seen_low)[:, -1]
        if negative is not None:
            unconditional, conditional = widened(logits).chunk(2)
            logits = guided(conditional, unconditional, sampling.guidance_scale)
        finite &= logits.isfinite().all(1)
        codes[:, row, column] = drawn(logits, uniform[:, i], sampling)
        if progress is not None:
            progress(i + 1, steps)
    return codes, finite


def seen(
    codes: Tensor, row: int, column: int, top: int, left: int, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The codes of the window at (top, left) before (row, column), by rows, (N, n), and the places in the trained grid
    of these and of that one, (n + 1,)."""
    inside = codes[:, top : top + window[0], left : left + window[1]]
    rows, columns = inside.shape[1:]
    n = (row - top) * columns + column - left
    places = torch.arange(rows, device=codes.device)[:, None] * window[1] + torch.arange(
        columns, device=codes.device
    )
    return inside.flatten(1)[:, :n], places.flatten()[: n + 1]


def twice(codes: Tensor, text: TextFeatures) -> Tensor:
    """The codes of N pictures for a batch of N or 2 N captions."""
    return torch.cat([codes] * (len(text) // len(codes)))
