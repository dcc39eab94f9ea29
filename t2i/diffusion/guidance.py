"""Classifier-free guidance (Ho & Salimans 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2i.interfaces import TextFeatures


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond): their eq. 6 with scale = 1 + w, so that 1 is no guidance and 0 ignores
    the text. Any objective's output may be guided: at a given x_t all are affine in one another."""
    return uncond + scale * (cond - uncond)


def classifier_free(
    model: Callable[[Tensor, Tensor, TextFeatures], Tensor],
    cond: TextFeatures,
    uncond: TextFeatures,
    scale: float,
) -> Callable[[Tensor, Tensor], Tensor]:
    """model(x, t, text) as a guided function of (x, t), one call of the model per call: on the batch
    [uncond, cond], or, where scale is 1, on cond alone.

    cond, uncond: B captions each, tokens of the same length
    x: (B, ...), t: (B,)
    """
    if scale == 1:
        return lambda x, t: model(x, t, cond)
    both = TextFeatures(
        tokens=torch.cat([uncond.tokens, cond.tokens]),
        pooled=torch.cat([uncond.pooled, cond.pooled]),
        mask=torch.cat([uncond.mask, cond.mask]),
    )

    def guided_model(x: Tensor, t: Tensor) -> Tensor:
        out_uncond, out_cond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return guided(out_cond, out_uncond, scale)

    return guided_model
