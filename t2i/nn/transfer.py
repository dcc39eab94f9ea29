"""Small tensors made on the host, brought to where they are used."""

from __future__ import annotations

import torch
from torch import Tensor


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, where it may be already. The host does not wait for a GPU: it copies from
    page-locked memory, in the order of its stream."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)
