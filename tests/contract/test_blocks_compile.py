"""What `trainer.compile` compiles is one graph each: dynamo finds no break in any of the blocks of a trained network,
in every experiment. On the meta device, so that the published ones take no memory."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from experiment_networks import trained_networks
from torch import nn

from t2i.nn.blocks import blocks_of


def kind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The same of blocks that differ in widths and sizes alone."""
    given = [(name, getattr(value, "ndim", value)) for name, value in [*enumerate(args), *kwargs.items()]]
    return re.sub(r"\d+(, \d+)*", "n", repr(block)) + str(given)


@pytest.mark.parametrize("pattern", ["*/tiny_*.yaml", pytest.param("**/*.yaml", marks=pytest.mark.slow)])
def test_dynamo_finds_no_break_in_any_block(pattern, compose_run):
    seen = set()

    def explained(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before a block's forward pass."""
        if (key := kind(block, args, kwargs)) in seen:
            return
        seen.add(key)
        torch._dynamo.reset()
        found = torch._dynamo.explain(block.forward)(*args, **kwargs)
        assert found.graph_count <= 1, (type(block), found.break_reasons)
        assert not found.break_reasons, (type(block), found.break_reasons)

    for _, network in trained_networks(pattern, compose_run):
        for block in blocks_of(network.module):
            block.register_forward_pre_hook(explained, with_kwargs=True)
        with torch.device("meta"):
            network.module(**network.inputs(2))
    assert len(seen) > 10
