"""What is computed in at least single precision."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Half precisions and whole numbers as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
