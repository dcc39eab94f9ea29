"""Classifier-free guidance (Ho & Salimans 2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from t2i.diffusion.config import DiffusionSampling
from t2i.diffusion.schedules import Schedule
from t2i.interfaces import TextFeatures
from t2i.nn.guidance import both_texts, guided


def rescaled(out: Tensor, cond: Tensor, share: float) -> Tensor:
    """`out` brought `share` of the way to the standard deviation that `cond` has, per sample (Lin et al. 2305.08891,
    eq. 15 and 16). Both (B, ...)."""
    axes = tuple(range(1, out.ndim))
    ratio = cond.std(axes, keepdim=True) / out.std(axes, keepdim=True)
    return out * (share * ratio + (1 - share))


def thresholded(x0: Tensor, share: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2205.11487, section 2.3): cut to [-s, s] and divided by s, where s is the
    quantile `share` of a sample's absolute values, but at least 1. x0: (B, ...) -> in [-1, 1]."""
    # One by one: older torch takes 2^24 numbers at most, and six pictures of 1,024 px are more.
    limit = torch.stack([each.quantile(share) for each in x0.abs().flatten(1)]).clamp(min=1)
    limit = limit.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


def classifier_free(
    model: Callable[[Tensor, Tensor, TextFeatures], Tensor],
    cond: TextFeatures,
    uncond: TextFeatures,
    sampling: DiffusionSampling,
    schedule: Schedule,
    channels: int | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """model(x, t, text) as a guided function of (x, t), one call of the model per call: on the batch
    [uncond, cond], or, where there is no guidance, on cond alone.

    cond, uncond: B captions each, tokens of the same length
    channels: only so many are guided, the others are those of cond: a learned variance (GLIDE); None: all
    x: (B, ...), t: (B,), equal times
    """
    if sampling.guidance_scale == 1:
        return lambda x, t: model(x, t, cond)
    both = both_texts(uncond, cond)
    low, high = sampling.guidance_interval

    def guided_model(x: Tensor, t: Tensor) -> Tensor:
        if (low, high) != (0.0, math.inf):
            alpha, sigma = (value.item() for value in schedule.alpha_sigma(t[:1]))
            if not (low * alpha < sigma and (high == math.inf or sigma <= high * alpha)):
                return model(x, t, cond)
        out_uncond, out_cond = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        kept = out_cond[:, :channels]
        out = guided(kept, out_uncond[:, :channels], sampling.guidance_scale)
        if sampling.guidance_rescale > 0:
            out = rescaled(out, kept, sampling.guidance_rescale)
        return out if channels is None else torch.cat([out, out_cond[:, channels:]], dim=1)

    return guided_model
