"""What a request says of the noise and of the text: each picture's own, or what lies between two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2i.config import check
from t2i.interfaces import SampleRequest, TextEncoder, TextFeatures
from t2i.nn.noise import draw_noise


def slerp(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Along the great circle from `first` to `second` (Shoemake 1985): the angle is taken between their directions, so
    that noise keeps its norm, which a straight line would shrink; straight where they have one direction.

    first, second: (B, ..., D) vectors over the last axis; share: (B,) from 0 to 1
    """
    share = share.to(first).view(-1, *[1] * (first.ndim - 1))
    norms = first.norm(dim=-1, keepdim=True) * second.norm(dim=-1, keepdim=True)
    cosine = (first * second).sum(-1, keepdim=True) / norms.clamp_min(torch.finfo(first.dtype).tiny)
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    straight = sine < 1e-6
    sine = torch.where(straight, 1.0, sine)
    a = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    b = torch.where(straight, share, (share * angle).sin() / sine)
    return a * first + b * second


def asked_noise(
    request: SampleRequest, generators: Sequence[torch.Generator], shape: Sequence[int]
) -> Tensor:
    """(N, *shape) ~ N(0, I) on the CPU, row i from generators[i] alone, and from request.between's seed; or the noise
    that the request has. Raises ConfigError where that is of another shape."""
    if request.noise is not None:
        found, wanted = tuple(request.noise.shape[1:]), tuple(shape)
        check(found == wanted, "noise", f"of shape {found}", f"{wanted} with this model and size")
        return request.noise
    noise, between = draw_noise(generators, shape), request.between
    if between is None or between.seeds is None:
        return noise
    other = draw_noise([torch.Generator("cpu").manual_seed(seed) for seed in between.seeds], shape)
    return slerp(noise.flatten(1), other.flatten(1), torch.tensor(between.shares)).view_as(noise)


def asked_text(encoder: TextEncoder, request: SampleRequest) -> TextFeatures:
    """Of the request's prompts, or of what lies between them and request.between's: each token's state and the pooled
    vector on their great circles. A token is attended to where either end has it, but for the ends themselves."""
    text, between = encoder(list(request.prompts)), request.between
    if between is None or between.prompts is None:
        return text
    other, share = encoder(list(between.prompts)), torch.tensor(between.shares, device=text.mask.device)
    at_first, at_second = (share == 0)[:, None], (share == 1)[:, None]
    return TextFeatures(
        tokens=slerp(text.tokens, other.tokens, share),
        pooled=slerp(text.pooled, other.pooled, share),
        mask=(text.mask & ~at_second) | (other.mask & ~at_first),
    )
