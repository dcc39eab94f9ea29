"""Masked modelling of codes and their parallel decoding (MaskGIT, Chang et al. 2202.04200; Muse, 2301.00704)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.codes.config import CodeSampling
from t2i.codes.sampling import drawn, raced
from t2i.interfaces import Progress
from t2i.nn.once import weights_unchanged
from t2i.nn.precision import widened
from t2i.nn.transfer import placed

Predict = Callable[[Tensor, Tensor, float], Tensor]
"""(codes, unknown, share) -> logits: codes (B, N) int64 mean nothing where unknown (B, N) is True; share: of the walk
that was done, 0 at its first step and 1 at its last; logits: (B, N, num_codes)."""


def random_mask(ratio: Tensor, order: Tensor) -> Tensor:
    """What a training step hides: ceil(cos(pi / 2 ratio) N) of N positions (2202.04200, sections 3.1 and 3.3), at least
    one and at most all.

    ratio: (B,) and order: (B, N) in [0, 1); those with the lowest order are hidden -> (B, N) bool
    """
    count = (torch.cos(ratio * (math.pi / 2)) * order.shape[1]).ceil().clamp(1, order.shape[1])
    return order.argsort(dim=1).argsort(dim=1) < count[:, None]


def masked_loss(logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-> (B,): the mean cross-entropy of a picture's hidden positions, and of no other.

    logits: (B, N, num_codes); codes: (B, N) int64; mask: (B, N) bool, True where hidden, somewhere in each picture
    label_smoothing: the share of the target that all codes have alike (1512.00567, section 7)
    """
    logits = widened(logits).transpose(1, 2)
    losses = F.cross_entropy(logits, codes, reduction="none", label_smoothing=label_smoothing)
    return (losses * mask).sum(1) / mask.sum(1)


def masked_share(ratio: float) -> float:
    """gamma = cos(pi / 2 ratio): the share of the positions that stays hidden after this share of the steps; in single
    precision, as the published code has it: for 256 codes and 2 of 3 steps that is a code less than in double."""
    return float(np.float32(math.cos(np.float32(math.pi / 2) * np.float32(ratio))))


def still_unknown(total: Tensor, unknown: Tensor, ratio: float) -> Tensor:
    """(B,) int64: how many positions stay hidden after this share of the steps: floor(gamma total), one less than
    before at the least, but no less than one.

    total: (B,) how many there were to draw at all; unknown: (B,) how many are hidden
    """
    wanted = (total * masked_share(ratio)).floor().long()
    return torch.minimum(wanted, unknown - 1).clamp_min(1).minimum(unknown)


@weights_unchanged()
def decode(
    predict: Predict,
    codes: Tensor,
    unknown: Tensor,
    steps: int,
    generators: Sequence[torch.Generator],
    sampling: CodeSampling,
    choice_temperature: float,
    order: Tensor | None = None,
    strength: float = 1.0,
    noise_per: Literal["position", "code"] = "position",
    progress: Progress | None = None,
) -> Tensor:
    """Draws the unknown codes, all of them in each step, and keeps those of which the model is most confident, more
    from step to step (2202.04200, section 3.2).

    codes: (B, N) int64, known where unknown (B, N) bool is False -> (B, N) int64
    steps: from all unknown to none
    generators: one for each picture, on the CPU: all that is random about it
    sampling: how a code is drawn from its logits
    choice_temperature: of the noise on the confidence in a drawn code, which is log p + choice_temperature
        (1 - k / steps) Gumbel noise in step k of 1 to `steps`, with p at temperature 1 and of all codes. diffusers'
        AmusedScheduler goes from T to 0 over the same steps, which is T steps / (steps - 1) here
    order: (N,) int64, positions in the order in which they are kept, whatever the model is confident of, as
        `halton_order` gives it
    strength: below 1, a share of the unknown positions, drawn at random, begins with its codes, as if the first
        1 - strength of the steps had been done and had kept them (2301.00704, section 2.8)
    noise_per: a random number for each position, or one for each of its codes too, drawn in single precision as
        AmusedScheduler does: with one generator both draw the same
    """
    done = steps - max(1, round(strength * steps))
    total = unknown.sum(1)
    if done:
        chance = placed(uniform(generators, codes.shape[1]), codes.device).masked_fill(~unknown, 2.0)
        unknown = lowest(chance, still_unknown(total, total + 1, done / steps))
    rank = None if order is None else placed(order.argsort().float(), codes.device)
    precision = torch.float32 if noise_per == "code" else torch.float64
    for step in range(done, steps):
        logits = predict(codes, unknown, step / max(steps - 1, 1))
        if noise_per == "code":
            new = raced(logits, exponential(generators, logits.shape[1:]), sampling)
        else:
            chance = placed(uniform(generators, codes.shape[1]), codes.device)
            new = drawn(logits.flatten(0, 1), chance.flatten(), sampling).view_as(codes)
        codes = torch.where(unknown, new, codes)
        if step < steps - 1:
            ratio = (step + 1) / steps
            noise = placed(gumbel(uniform(generators, codes.shape[1], precision)), codes.device)
            if rank is None:
                log_p = widened(logits).log_softmax(-1).gather(-1, new[..., None])[..., 0]
                confidence = log_p + choice_temperature * (1 - ratio) * noise.to(log_p)
            else:
                confidence = -rank.expand(codes.shape)
            confidence = confidence.masked_fill(~unknown, math.inf)
            unknown = lowest(confidence, still_unknown(total, unknown.sum(1), ratio))
        if progress is not None:
            progress(step + 1 - done, steps - done)
    return codes


def lowest(values: Tensor, count: Tensor) -> Tensor:
    """values: (B, N), count: (B,) -> (B, N) bool: the `count` lowest of each row; of equal ones the first."""
    return values.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]


def uniform(generators: Sequence[torch.Generator], count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, count) in [0, 1), on the CPU, row i from generators[i] alone."""
    return torch.stack([torch.rand(count, generator=each, dtype=dtype) for each in generators])


def exponential(generators: Sequence[torch.Generator], shape: torch.Size) -> Tensor:
    """(B, *shape) of mean 1, float32 on the CPU, picture i's from generators[i] alone."""
    return torch.stack(
        [torch.empty(shape, dtype=torch.float32).exponential_(generator=each) for each in generators]
    )


def gumbel(chance: Tensor) -> Tensor:
    """Standard Gumbel noise of numbers in [0, 1)."""
    tiny = torch.finfo(chance.dtype).tiny
    return -(-chance.clamp_min(tiny).log()).log()


def halton_order(height: int, width: int) -> Tensor:
    """(height * width,) int64: positions of a grid, row by row, in the order in which the points of Halton's sequence
    (bases 2 along the width and 3 along the height) first fall on them: each next one far from those before (Besnier
    et al. 2503.17076, section 3.3)."""
    found: dict[int, None] = {}  # in order
    n = 0
    while len(found) < height * width:
        n += 1
        found.setdefault(int(radical_inverse(n, 3) * height) * width + int(radical_inverse(n, 2) * width))
    return torch.tensor(list(found))


def radical_inverse(n: int, base: int) -> float:
    """The digits of n in this base, mirrored at the point."""
    value, scale = 0.0, 1.0 / base
    while n:
        n, digit = divmod(n, base)
        value, scale = value + digit * scale, scale / base
    return value
