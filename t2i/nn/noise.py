"""Noise of which each row has a source of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """(N, *shape) ~ N(0, I) on the CPU, row i from generators[i] alone."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])
