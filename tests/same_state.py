"""Whether two states are the same."""

from __future__ import annotations

import torch


def same(found, expected) -> bool:
    """To the bit, dtypes too, in dictionaries and lists."""
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected
