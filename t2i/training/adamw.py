"""AdamW (1711.05101) on the rows that a process holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2i.training.divided import own


class AdamW(torch.optim.AdamW):
    """torch's, which steps each number by itself: so rows as well as the whole, without asking other processes, and
    what is divided beside what is not. The fused one takes for granted that a gradient lies in memory as its parameter
    does, and else gives each number the gradient of another: one that does not is copied."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        """Fills lists with parameters, gradients and moments."""
        found = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [own(tensor) for tensor in tensors]
        parameters, gradients = lists[:2]
        gradients[:] = [
            gradient
            if gradient.stride() == parameter.stride()
            else torch.empty_like(parameter).copy_(gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        return found
