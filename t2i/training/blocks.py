"""What `trainer.activation_checkpointing` and `trainer.compile` make of a stage's blocks, in place: names and weights
stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t2i.nn.blocks import run_again


def prepare(blocks: Sequence[nn.Module], activation_checkpointing: bool, compiled: bool) -> None:
    """activation_checkpointing: a block, or each layer of a stack that is not compiled, keeps its inputs alone for the
        backward pass and is run again in it (1604.06174); one with buffers is run once, since it may change them
        (batch norm's statistics, a codebook)
    compiled: each block is compiled by itself, when it is first called
    """
    if compiled:
        # Blocks of one class run one function, and dynamo stops compiling a function after 8 shapes of it.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 8 * len(blocks))
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * len(blocks))
        # The adaptive weight of an autoencoder goes back through its last blocks twice.
        torch._functorch.config.donated_buffer = False
    for block in run_again(blocks) if activation_checkpointing and not compiled else blocks:
        forward = torch.compile(block.forward) if compiled else block.forward
        if activation_checkpointing and next(block.buffers(), None) is None:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward
