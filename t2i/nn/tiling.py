"""Pictures that continue on their other side, so that copies of them join without a seam."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from t2i.config import check
from t2i.interfaces import SampleRequest, Tile


def check_tile(request: SampleRequest, denoiser: nn.Module) -> None:
    """Raises ConfigError where pictures of this denoiser cannot continue on their other side."""
    ok = not request.tile or not getattr(denoiser, "has_positions", True)
    check(ok, "tile", request.tile, "none with this model, whose network knows its place in the picture")


@contextmanager
def tiled(tile: Tile, *networks: nn.Module) -> Iterator[None]:
    """Within this context the convolutions of `networks` read on from the other side along the axes of `tile`, in place
    of zeros. Networks without positions then do to a picture moved around what they do to the picture."""
    convs = [
        module
        for network in (networks if tile else ())  # the walk takes longer than a small network's step
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0)
    ]
    before = [conv.padding for conv in convs]
    hooks = []
    for conv in convs:
        assert isinstance(conv.padding, tuple)
        rows, columns = conv.padding
        x, y = columns if "x" in tile else 0, rows if "y" in tile else 0
        conv.padding = (rows - y, columns - x)
        hooks.append(conv.register_forward_pre_hook(_padding(x, y)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for conv, padding in zip(convs, before, strict=True):
            conv.padding = padding


def _padding(x: int, y: int) -> Any:
    def pad(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (F.pad(inputs[0], (x, x, y, y), mode="circular"),)

    return pad
