"""Memory of one GPU while training, by part, for DistributedDataParallel and FSDP's shardings (2304.11277)."""

from __future__ import annotations

import math
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
    gathered: bytes in which FSDP gathers all of them
    in_blocks: of these, those of the blocks that it gathers one at a time; the others are there for a whole pass
    largest_block: of these, those of the largest block
    rows: of each trained tensor, how many rows and numbers in a row; empty: of one number each
    turns: of a step
    """

    parameters: int
    muon: int
    averaged: int
    frozen_bytes: int
    gathered: int
    in_blocks: int
    largest_block: int
    rows: tuple[tuple[int, int], ...] = ()
    turns: int = 1

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps."""
        return ADAMW_MOMENTS * (self.parameters - self.muon) + MUON_MOMENTS * self.muon

    def share(self, shards: int) -> float:
        """Of what is trained, the part that the first of so many processes holds: FSDP divides tensors by whole rows,
        and leaves single numbers whole."""
        if not self.rows:
            return 1 / shards
        return sum(math.ceil(rows / shards) * row for rows, row in self.rows) / self.parameters


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
    whole = FP32 * trained.parameters
    if strategy == "ddp":
        share, gathered, copies = 1.0, 0, kept.fixed
        buffers = whole if num_gpus > 1 else 0
    else:
        share = trained.share(gpus_per_node if strategy == "hybrid_shard" else num_gpus)
        copies, buffers = 0, 0  # gradients are reduced block by block, while activations go
        # All blocks, or only the largest, and the buffer that it was gathered into; with what is beside them.
        beside = trained.gathered - trained.in_blocks
        gathered = trained.largest_block + beside
        gathered += trained.in_blocks if strategy == "shard_grad_op" else trained.largest_block
    return Memory(
        weights=round(whole * share) + gathered,
        copies=copies,
        gradients=whole if accumulates else round(whole * share),
        buffers=buffers,
        optimizer=round(FP32 * trained.moments * share),
        ema=round(FP32 * trained.averaged * share),
        frozen=trained.frozen_bytes,
        activations=per_image * images_at_a_time,
        encoding=encoding_per_image * images_at_a_time,
    )
