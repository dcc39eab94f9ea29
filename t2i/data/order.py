"""Which sample stands at which position of the endless stream, and the randomness that goes with it.

Everything here is a pure function of integers. Epochs follow one another without a gap: position p of the
stream is sample `epoch_order(..., epoch=p // N)[p % N]` of N. Batch k of a run takes the positions
[kG, (k+1)G), G = batch_size * world_size, and rank r of them [kG + rB, kG + (r+1)B), B = batch_size. So one
integer, images seen, is the whole state of reading, whatever the number of ranks or workers before or after.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a random number is for; streams are independent of one another."""

    SHARDS = 0
    SAMPLES = 1
    DROPOUT = 2
    CAPTION = 3
    CROP_TOP = 4
    CROP_LEFT = 5
    FLIP = 6


def hash64(*parts: int | np.ndarray) -> np.ndarray:
    """Counter-based random bits: integers (arrays broadcast) -> uint64 of at least one dimension.

    SplitMix64's finaliser (Steele, Lea & Flood 2014) chained over `parts`. Our own lines rather than a numpy
    Generator, because numpy may change the streams of Generator methods between versions, and a resumed run
    must not notice.
    """
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        if isinstance(part, int):
            part = np.array([part & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64)
        state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def uniform(seed: int, stream: Stream, epoch: int | np.ndarray, sample: int | np.ndarray) -> np.ndarray:
    """float64 in [0, 1), one for each (epoch, sample)."""
    return (hash64(seed, int(stream), epoch, sample) >> np.uint64(11)) * 2.0**-53


def epoch_order(
    shard_sizes: Sequence[int] | np.ndarray, seed: int, epoch: int, window_shards: int
) -> np.ndarray:
    """The order in which an epoch reads its samples, each exactly once.

    shard_sizes: samples per shard; sample j of shard i has the global index sum(shard_sizes[:i]) + j
    window_shards: shards are permuted, then samples are shuffled within groups of so many shards
    returns (sum(shard_sizes),) int64 global sample indices
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = np.argsort(hash64(seed, int(Stream.SHARDS), epoch, np.arange(len(sizes))), kind="stable")
    windows = []
    for first in range(0, len(shards), window_shards):
        window = shards[first : first + window_shards]
        samples = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in window])
        # The bits belong to the sample, so that ties (1 in 2^64) are broken by shard order and nothing else.
        windows.append(samples[np.argsort(hash64(seed, int(Stream.SAMPLES), epoch, samples), kind="stable")])
    return np.concatenate(windows) if windows else np.empty(0, dtype=np.int64)
