"""The two losses of GAN-INT-CLS (Reed et al., 1605.05396, algorithm 1 and equation 5), of logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def matching_aware_loss(real: Tensor, wrong: Tensor, fake: Tensor, wrong_weight: float) -> Tensor:
    """Scalar: binary cross-entropy of the pair (real picture, its caption) against (real picture, another's caption),
    with `wrong_weight`, and (generated picture, its caption), with the rest of 1.

    real, fake: (B,) logits; wrong: (N,), where N = 0 stands for a batch in which no pair is wrong
    """
    loss = F.softplus(-real).mean() + (1 - wrong_weight) * F.softplus(fake).mean()
    return loss + wrong_weight * F.softplus(wrong).mean() if len(wrong) else loss


def generator_loss(fake: Tensor, interpolated: Tensor, interpolation_weight: float) -> Tensor:
    """Scalar: non-saturating loss (1406.2661), weighted mean over B captions and N captions between two.

    fake: (B,) logits; interpolated: (N,). As in the published code, the sum is divided by B + N, whatever the weight.
    """
    total = F.softplus(-fake).sum() + interpolation_weight * F.softplus(-interpolated).sum()
    return total / (len(fake) + len(interpolated))


def interpolated_captions(pooled: Tensor) -> Tensor:
    """(B, P) -> (B // 2, P): the middle of each of the first half with one of the second (beta = 0.5)."""
    half = len(pooled) // 2
    return (pooled[:half] + pooled[half : 2 * half]) / 2


def wrong_pairs(captions: list[str]) -> tuple[list[int], list[int]]:
    """Indices of pictures and of captions that are not theirs: each picture with the caption before it in the batch,
    where the two captions differ."""
    pairs = [(i, i - 1) for i in range(len(captions)) if captions[i] != captions[i - 1]]
    return [i for i, _ in pairs], [j % len(captions) for _, j in pairs]
