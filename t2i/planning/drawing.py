"""What drawing a picture takes, one at a time on one GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from t2i.interfaces import PlannedNetwork
from t2i.planned import PlannedCalls
from t2i.planning.config import ClusterConfig
from t2i.planning.count import flops

NUMBER = 2  # bytes of a weight, a key or a value: bfloat16


@dataclass(frozen=True)
class Calls:
    """Of one network, counted.

    flops: of the first and of the last; cached, count: as `t2i.planned.PlannedCalls` has them
    weights: how many numbers each call reads
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
    with torch.device("meta"):
        first, last = (flops(run, with_backward=False).forward for run in (calls.first, calls.last))
    weights = network.parameters if calls.weights is None else calls.weights
    return Calls(network.name, calls.count, weights, (first, last), calls.cached)
