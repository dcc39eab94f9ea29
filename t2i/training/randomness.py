"""What a train step draws, as a function of (seed, the sample's position in the stream, what it is drawn for) alone.

So one process with a batch of 8, two with 4, and four with 2 in two micro-batches see the same numbers, a resumed run
sees what the whole one saw, and no process draws more than its own.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from t2i.data.order import hash64

# SplitMix64's finaliser, as `t2i.data.order.hash64` has it, in the signed integers of torch.
GAMMA, FIRST, SECOND = (
    value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Randomness:
    """position: (B,) int64 on the device: the samples' places in the endless stream; dtype: of what is drawn.

    Each `purpose` ("noise", "time") has numbers of its own: asking twice for one gives the same ones again.
    """

    def __init__(self, seed: int, position: Tensor, dtype: torch.dtype) -> None:
        self.seed, self.position, self.dtype = seed, position, dtype

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) in [0, 1), on the device."""
        digits = 53 if self.dtype == torch.float64 else 24  # so that no number is rounded up to 1
        drawn = _shifted(self._bits(purpose, math.prod(shape)), 64 - digits).to(self.dtype) * 2.0**-digits
        return drawn.view(-1, *shape)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """(B, *shape) ~ N(0, I), on the device: Box & Muller 1958."""
        count = math.prod(shape)
        bits = self._bits(purpose, -(-count // 2))
        radius = (_shifted(bits, 32).to(self.dtype) + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = (bits & 0xFFFF_FFFF).to(self.dtype).mul_(2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return pairs[:, :count].reshape(-1, *shape)

    def _bits(self, purpose: str, count: int) -> Tensor:
        """(B, count) int64 of random bits."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        key = int(hash64(int.from_bytes(digest[:8])).view("int64")[0])
        of_sample = _hashed(self.position ^ key)[:, None]
        return _hashed(of_sample ^ torch.arange(count, device=self.position.device))


def _hashed(state: Tensor) -> Tensor:
    state = state + GAMMA
    state = state.bitwise_xor_(_shifted(state, 30)).mul_(FIRST)
    state = state.bitwise_xor_(_shifted(state, 27)).mul_(SECOND)
    return state.bitwise_xor_(_shifted(state, 31))


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left: torch copies the sign."""
    return (bits >> by).bitwise_and_(2 ** (64 - by) - 1)
