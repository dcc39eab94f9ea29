"""Classifier-free guidance (Ho & Salimans, 2207.12598) of any output: a noise, a velocity, the logits of codes."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.interfaces import TextFeatures


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond): their eq. 6 with scale = 1 + w, so that 1 is no guidance and 0 ignores
    the text. Any diffusion objective's output may be guided: at a given x_t all are affine in one another. Of logits:
    2203.13131, equation 5."""
    return torch.lerp(uncond, cond, scale)


def both_texts(uncond: TextFeatures, cond: TextFeatures) -> TextFeatures:
    """One batch for one call of the model, the unconditional captions first; tokens of the same length."""
    return TextFeatures(
        tokens=torch.cat([uncond.tokens, cond.tokens]),
        pooled=torch.cat([uncond.pooled, cond.pooled]),
        mask=torch.cat([uncond.mask, cond.mask]),
    )
