"""The blocks that a network is made of, one at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from t2i.nn.unet import Stack


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of the network's outermost lists, and what stands beside those lists: what activation checkpointing
    runs again, and compilation and sharding take, one at a time."""
    found: list[nn.Module] = []
    for child in network.children():
        holds_list = any(isinstance(inner, nn.ModuleList) for inner in child.modules())  # itself too
        found += blocks_of(child) if holds_list and not isinstance(child, Stack) else [child]
    return found


def run_again(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """What activation checkpointing runs again at a time: a block, or each layer of a `Stack`, so that a residual block
    and an attention are not alive together."""
    return [part for block in blocks for part in (block if isinstance(block, Stack) else [block])]
