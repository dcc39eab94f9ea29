"""Fixed sinusoidal embeddings of times and positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t2i.nn.precision import widened


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """t: (B,) times, whole or fractional; dim: even -> (B, dim), float64 where t is, else float32: cosines first,
    then sines, of frequencies from 1 down to about 1 / max_period (arXiv:2006.11239, in the order of Stable
    Diffusion, whose float32 values these are to the last bit).
    Raises ValueError where `dim` is odd."""
    if dim % 2:
        raise ValueError(f"timestep_embedding needs an even dim, got {dim}")
    half = dim // 2
    t = widened(t)
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_2d(
    height: int,
    width: int,
    dim: int,
    scale: float | tuple[float, float] = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Position embedding of a grid -> (height * width, dim) float32, rows of the grid first.

    The first half of `dim` embeds the column and the second half the row, each as sines, then cosines
    (arXiv:2212.09748, following arXiv:2111.06377). Positions are index / scale: a model that has learned a
    32 x 32 grid meets the positions it knows on a 64 x 64 one at scale 2. Two scales are of rows and of columns.
    Raises ValueError where `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sincos_2d needs a dim divisible by 4, got {dim}")
    quarter = dim // 4
    # Apple's GPUs have no float64.
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    frequency = 10_000.0 ** -(torch.arange(quarter, dtype=dtype, device=device) / quarter)
    row_scale, column_scale = scale if isinstance(scale, tuple) else (scale, scale)
    row = torch.arange(height, dtype=dtype, device=device)[:, None] / row_scale * frequency
    column = torch.arange(width, dtype=dtype, device=device)[:, None] / column_scale * frequency
    column_embedding = torch.cat([column.sin(), column.cos()], dim=1)
    row_embedding = torch.cat([row.sin(), row.cos()], dim=1)
    grid = torch.cat(
        [column_embedding[None].expand(height, -1, -1), row_embedding[:, None].expand(-1, width, -1)], dim=2
    )
    return grid.flatten(0, 1).float()
