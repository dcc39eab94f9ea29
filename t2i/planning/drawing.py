"""What drawing a picture takes, one at a time on one GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t2i.nn.once import weights_unchanged
from t2i.planned import PlannedCalls, PlannedNetwork
from t2i.planning.config import ClusterConfig
from t2i.planning.count import flops

NUMBER = 2  # bytes of a weight, a key or a value: bfloat16
LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)


@dataclass(frozen=True)
class Calls:
    """Of one network, counted.

    count: as `t2i.planned.PlannedCalls` has it
    weights: how many numbers each call reads
    flops: of the first and of the last; cached: how many numbers of keys and values these attend to that are kept
    """

    name: str
    count: int
    weights: int
    flops: tuple[int, int]
    cached: tuple[int, int]

    @property
    def total_flops(self) -> float:
        """Of all calls: those of an arithmetic series."""
        return self.count * sum(self.flops) / 2

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values at the last call."""
        return NUMBER * self.cached[1]

    def seconds(self, cluster: ClusterConfig) -> float:
        """At least, on one GPU: each call waits for its arithmetic at the peak or for its weights, keys and values to
        come from memory, whichever takes longer."""
        peak, bandwidth = cluster.peak_bf16_tflops * 1e12, (cluster.memory_gb_per_s or math.inf) * 1e9
        total = 0.0
        for i in range(self.count):
            share = i / max(self.count - 1, 1)
            arithmetic = self.flops[0] + share * (self.flops[1] - self.flops[0])
            cached = self.cached[0] + share * (self.cached[1] - self.cached[0])
            total += max(arithmetic / peak, NUMBER * (self.weights + cached) / bandwidth)
        return total


def counted_calls(network: PlannedNetwork) -> list[Calls]:
    """Those of drawing one picture, on the meta device."""
    return [_counted(network, calls) for calls in network.drawing]


def _counted(network: PlannedNetwork, calls: PlannedCalls) -> Calls:
    first = _call(network, calls, calls.first)
    last = first if calls.last is calls.first else _call(network, calls, calls.last)
    cached = calls.cached[0] + first.kept, calls.cached[1] + last.kept
    return Calls(network.name, calls.count, first.weights, (first.flops, last.flops), cached)


@dataclass(frozen=True)
class _Call:
    """weights: numbers read of the network's and of tables made of them; kept: of what was made before of the text, or
    of other codes"""

    flops: int
    weights: int
    kept: int


@torch.no_grad()
def _call(network: PlannedNetwork, calls: PlannedCalls, run: Callable[[], Tensor]) -> _Call:
    with torch.device("meta"), weights_unchanged() as kept:
        if calls.after is not None:
            calls.after()
        tables = [made for given, made in kept.values() if not given]
        states = tree_leaves([made for given, made in kept.values() if given])
        read = [_Read([*network.module.parameters(), *tables]), _Read(states)]
        with read[0], read[1]:
            count = flops(run, with_backward=False).forward
    return _Call(count, *(each.count for each in read))


class _Read(TorchDispatchMode):
    """count: how many numbers of these tensors are computed with, each once; of a table that rows are looked up in, as
    many as these have"""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.tensors = list(tensors)
        self.sizes = {_storage(tensor): tensor.numel() for tensor in self.tensors}
        self.read = dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (storage := _storage(tensor)) in self.sizes:
                size = self.sizes[storage]
                number = min(out.numel(), size) if func in LOOKUPS else size
                self.read[storage] = max(number, self.read.get(storage, 0))
        return out

    @property
    def count(self) -> int:
        return sum(self.read.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
