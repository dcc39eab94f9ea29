"""In which precision is computed, and what is in at least single precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from t2i.config import Precision


def widened(x: Tensor) -> Tensor:
    """Half precisions and whole numbers as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chosen(precision: Precision, device: torch.device) -> Precision:
    """A run's trainer.precision, where "auto" is "bf16-mixed" on a GPU that computes in bfloat16, else "32-true"."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"


def mixed(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Within this context a GPU computes as in a run of this trainer.precision; a CPU as ever."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    precision = chosen(precision, device)
    if device.type != "cuda" or precision not in dtypes:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtypes[precision])


def freezes_in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether frozen networks are kept in bfloat16: where a GPU computes in it anyway."""
    return precision == "bf16-mixed" and device.type == "cuda"


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within this context what is computed on `device` has the dtype of what it is computed from."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_float16(device: torch.device) -> AbstractContextManager[object]:
    """Within this context autocast computes in bfloat16 or not at all, for what float16's range does not hold."""
    if device.type == "meta" or torch.get_autocast_dtype(device.type) != torch.float16:
        return nullcontext()
    return without_autocast(device)


def rounded(network: nn.Module, dtype: torch.dtype) -> None:
    """Keeps the weights of a frozen network's products in `dtype`, in place: those that autocast, within which the
    network has to run, would round at each use. Norms stay as exact as they are."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)
