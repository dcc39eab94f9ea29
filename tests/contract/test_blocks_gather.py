"""FSDP can gather the blocks of each experiment's trained networks one at a time: it takes them as units, and nobody
uses the weights of one outside of its own pass. On the meta device, as the first of eight processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from experiment_networks import trained_networks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from t2i.config import TrainerConfig
from t2i.nn.blocks import blocks_of
from t2i.training.divided import is_divided
from t2i.training.strategy import divide, with_forward

FOR_THE_STEP = ("text encoder", "discriminator", "classifier")  # what is gathered for all of a step


class Uses(TorchFunctionMode):
    """Collects the names of blocks' weights that are used while their block does not run."""

    def __init__(self, network: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        names = {id(p): name for name, p in network.named_parameters()}
        self.blocks = {id(p): (block, names[id(p)]) for block in blocks for p in block.parameters()}
        self.running: Counter[nn.Module] = Counter()
        self.outside: set[str] = set()
        for block in blocks:
            block.register_forward_pre_hook(lambda module, args: self.running.update([module]))
            block.register_forward_hook(lambda module, args, out: self.running.subtract([module]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":  # of shapes, types and devices
            for value in pytree.tree_leaves((args, kwargs)):
                block, name = self.blocks.get(id(value), (None, ""))
                if block is not None and not self.running[block]:
                    self.outside.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("pattern", ["*/tiny_*.yaml", pytest.param("**/*.yaml", marks=pytest.mark.slow)])
def test_blocks_are_gathered_one_at_a_time(pattern, mesh, compose_run):
    settings = TrainerConfig(num_images=1, batch_size=1, strategy="full_shard")
    seen = 0
    for name, network in trained_networks(pattern, compose_run):
        module = network.module
        blocks = [] if network.name in FOR_THE_STEP else with_forward(blocks_of(module))
        with torch.device("meta"), Uses(module, blocks) as uses:
            module(**network.inputs(2))
        assert not uses.outside, (name, network.name)
        divide(module, blocks, mesh, settings)
        assert all(is_divided(p) == (p.ndim > 0) for p in module.parameters()), name
        seen += 1
    assert seen > 10
