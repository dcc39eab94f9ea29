"""The sparse attention of DALL-E (2102.12092, appendix B.1 and figure 11): a code sees all of the text, and of the
codes before it those of about a row, of its column, or of a square around it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pattern = Literal["row", "column", "convolutional"]
KERNEL = 11  # of the convolutional pattern, codes along each side


def pattern_of(block: int, depth: int) -> Pattern:
    """Of block 0 to depth - 1: convolutional in the last, column in the second and each fourth after it, else row."""
    if block == depth - 1:
        return "convolutional"
    return "column" if block % 4 == 1 else "row"


def seen_before(pattern: Pattern, query: Tensor, key: Tensor, columns: int, kernel: int = KERNEL) -> Tensor:
    """(n,) and (m,) places in a grid, counted by rows -> (n, m) bool: whether the code at `query` sees that at `key`.

    row: the codes from the one above on, itself included; column: those above, and itself; convolutional: those of the
    upper half of a square of `kernel` around it, and itself. Rows are joined at their ends, as in the paper.
    """
    back = query[:, None] - key[None]
    if pattern == "row":
        return (back >= 0) & (back <= columns)
    if pattern == "column":
        return (back >= 0) & (back % columns == 0)
    half = kernel // 2
    up = (-torch.div(half - back, columns, rounding_mode="floor")).clamp(
        min=0
    )  # the fewest rows that reach it
    across = back - up * columns
    return (back >= 0) & (up <= half) & (across.abs() <= half)


def axial_mask(pattern: Pattern, query: Tensor, key: Tensor, columns: int, first: int) -> Tensor:
    """(n, m) bool, True where slot i of the queries sees slot j of the keys. Slots that hold no code, those of the text
    and the start, are seen by all after them, and see all before them.

    query: (n,) the places of the codes that the query slots hold, -1 for those that hold none; key: (m,) likewise
    first: how many slots come before those of `query`
    """
    slots = torch.arange(len(key), device=key.device)
    before = slots[None] <= first + torch.arange(len(query), device=key.device)[:, None]
    without = (query < 0)[:, None] | (key < 0)[None]
    return before & (without | seen_before(pattern, query, key, columns))
