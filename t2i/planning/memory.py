"""Memory of one GPU while training, by part, for DistributedDataParallel and FSDP's shardings (2304.11277)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from t2i.config import Strategy
from t2i.planning.count import Activations

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FP32 = 4  # bytes: trained and saved weights, gradients, moments and averages, whatever the precision
ADAMW_MOMENTS, MUON_MOMENTS = 2, 1


@dataclass(frozen=True)
class Trained:
    """What a training step holds beside activations, in parameters where nothing else is said.

    parameters: trained ones
    muon: of those, stepped by Muon
    averaged: of those, with a moving average
    frozen_bytes: weights of frozen networks
    largest_block: parameters of the largest block that FSDP gathers at a time
    compute_bytes: of a number that is computed with: 2 under mixed precision, else 4
    in_blocks: parameters of all blocks that FSDP gathers one at a time; the others are there for a whole pass
    turns: of a step
    """

    parameters: int
    muon: int
    averaged: int
    frozen_bytes: int
    largest_block: int
    compute_bytes: int
    in_blocks: int = 0
    turns: int = 1

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps."""
        return ADAMW_MOMENTS * (self.parameters - self.muon) + MUON_MOMENTS * self.muon


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    weights: those kept in float32, and under FSDP also the gathered ones
    copies: autocast's 16-bit copies of the weights (FSDP gathers in 16 bits instead)
    buffers: DDP's buckets, a second copy of all gradients
    encoding: what the largest frozen network takes while it runs, before the trained networks do
    """

    weights: int
    copies: int
    gradients: int
    buffers: int
    optimizer: int
    ema: int
    frozen: int
    activations: int
    encoding: int

    @property
    def total(self) -> int:
        """The most at a time. Gradients and activations are there together: Lightning frees the last step's
        gradients after the forward pass."""
        return sum(vars(self).values()) - min(self.activations, self.encoding)


def memory(
    trained: Trained,
    kept: Activations,
    encoding_per_image: int,
    images_at_a_time: int,
    strategy: Strategy,
    checkpointing: bool,
    num_gpus: int,
    gpus_per_node: int,
    accumulates: bool = False,
) -> Memory:
    """images_at_a_time: on one GPU: a micro-batch
    accumulates: there are several; each GPU then adds up whole gradients, which are reduced in the last
    """
    per_image = kept.per_image_checkpointed if checkpointing else kept.per_image
    whole, block = FP32 * trained.parameters, trained.compute_bytes * trained.largest_block
    if strategy == "ddp":
        shards, gathered, copies = 1, 0, kept.fixed
        buffers = whole if num_gpus > 1 else 0
    else:
        shards = gpus_per_node if strategy == "hybrid_shard" else num_gpus
        copies, buffers = 0, 0  # gradients are reduced block by block, while activations go
        # The largest block and the buffer that it was gathered into, or that buffer and all blocks.
        gathered = block + (
            trained.compute_bytes * trained.parameters if strategy == "shard_grad_op" else block
        )
    return Memory(
        weights=whole // shards + gathered,
        copies=copies,
        gradients=whole if accumulates else whole // shards,
        buffers=buffers,
        optimizer=FP32 * trained.moments // shards,
        ema=FP32 * trained.averaged // shards,
        frozen=trained.frozen_bytes,
        activations=per_image * images_at_a_time,
        encoding=encoding_per_image * images_at_a_time,
    )
