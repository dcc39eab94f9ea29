"""Bytes that processes send in a step, for DistributedDataParallel and FSDP's shardings (ZeRO, 1910.02054, section 7;
FSDP, 2304.11277, section 3).

In a ring of n, an all-gather and a reduce-scatter send (n - 1) / n of the whole from each process, and an all-reduce is
one after the other (Patarasuk & Yuan 2009): so do NCCL and, but for the reduce-scatter, gloo.
"""

from __future__ import annotations

from dataclasses import dataclass

from t2i.config import Strategy
from t2i.planning.config import ClusterConfig
from t2i.planning.memory import FP32, Trained


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step.

    weights, gradients, muon: sent by each GPU, which receives as many: weights that are gathered, gradients that are
        summed up, matrices that processes orthogonalise for one another
    node: sent by each node to others, of all its GPUs
    """

    weights: float
    gradients: float
    muon: float
    node: float

    @property
    def gpu(self) -> float:
        """Sent by each GPU."""
        return self.weights + self.gradients + self.muon


def traffic(trained: Trained, strategy: Strategy, cluster: ClusterConfig, micro_batches: int = 1) -> Traffic:
    """What t2i sends; what is logged, and buffers, do not count.

    micro_batches: of a step; sharded weights are gathered in each, and gradients summed up in the last one
    """
    n, nodes, by_gloo = cluster.num_gpus, cluster.nodes, not cluster.has_gpus
    gradients, muon = FP32 * trained.parameters, trained.muon
    orthogonal = FP32 if by_gloo else 2  # bytes of a number
    if strategy == "ddp":
        # All gradients in each turn, those that it leaves alone too.
        summed, shared = 2 * _ring(n) * gradients * trained.turns, _ring(n) * orthogonal * muon
        return Traffic(0.0, summed, shared, (summed + shared) * (nodes > 1))
    shards = cluster.gpus_per_node if strategy == "hybrid_shard" else n
    replicas = n // shards
    # In each turn forward, and blocks of which the weights were freed backward too.
    passes = trained.gathered * trained.turns + (trained.in_blocks if strategy != "shard_grad_op" else 0)
    weights = _ring(shards) * passes * micro_batches
    # gloo's reduce-scatter is an all-reduce of which a part is kept.
    scattered = _ring(shards) * gradients * (2 if by_gloo else 1)
    among_replicas = 2 * _ring(replicas) * gradients / shards
    shared = _ring(shards) * (FP32 + orthogonal) * muon / shards  # there and back, each its share
    if replicas > 1:
        node = among_replicas * shards
    else:
        # A ring leaves each node once; what goes from each to each leaves it from all GPUs.
        to_others = (n - cluster.gpus_per_node) / max(1, n - 1)
        node = (weights + scattered + shared * to_others * cluster.gpus_per_node) * (nodes > 1)
    return Traffic(weights, scattered + among_replicas, shared, node)


def _ring(processes: int) -> float:
    """The part of the whole that each of them sends."""
    return (processes - 1) / processes
