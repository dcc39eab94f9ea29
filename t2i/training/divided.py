"""Tensors of which each process holds some rows: what FSDP makes of trained weights, and so of their gradients,
moments and averages (torch's DTensor, divided along the first dimension)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_divided(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def own(tensor: Tensor) -> Tensor:
    """The rows that this process holds, in the same memory; a tensor that is not divided as it is."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows. Where it is divided, all processes have to ask."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor


def group_of(tensors: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The processes that hold the rows between them; None where the tensors are not divided."""
    first = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    return None if first is None else first.device_mesh.get_group(first.device_mesh.ndim - 1)


def rows_of(tensor: DTensor) -> slice:
    """Which rows this process holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offset[0], offset[0] + shape[0])


@torch.no_grad()
def put(value: Tensor, target: Tensor) -> None:
    """Copies a whole `value` over `target`: of a divided one, what this process holds."""
    own(target).copy_(value[rows_of(target)] if isinstance(target, DTensor) else value)


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole `value` of the model's shape, divided as the model is, on its device and in its layout in memory, which
    fused optimizers take for granted."""
    if value.stride() == model.stride() and value.device == model.device and not isinstance(model, DTensor):
        return value
    made = torch.empty_like(model, dtype=value.dtype)
    put(value, made)
    return made


def reshard(module: nn.Module) -> None:
    """Frees gathered weights, so that the next pass sees those of the optimizer, or the averaged ones."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()
