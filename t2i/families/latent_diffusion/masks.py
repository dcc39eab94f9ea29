"""Random masks to learn inpainting with."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.families.latent_diffusion.config import Masks
from t2i.training.randomness import Randomness

EVERYTHING = 0.1  # of the masks: text to image is learned too
BOXES, STROKES = 4, 4  # at most
TURNS = 5  # of a stroke


def random_masks(kind: Masks, random: Randomness, height_px: int, width_px: int) -> Tensor:
    """(B, 1, height_px, width_px), 1 where drawn anew. "rectangles": 1 to 4 boxes, each side a tenth to a half of the
    picture's. "lama": one half of them such boxes, the other 1 to 4 bent strokes, as wide as a twelfth to a third of
    the shorter side: LaMa's large masks (Suvorov et al. 2109.07161, appendix E). One in ten covers everything."""
    masks = boxes(random.uniform("mask boxes", BOXES, 4), random.uniform("mask count"), height_px, width_px)
    choice = random.uniform("mask kind", 2)
    if kind == "lama":
        drawn = strokes(
            random.uniform("mask strokes", STROKES, TURNS + 1, 2),
            random.uniform("mask widths", STROKES),
            random.uniform("mask count"),
            height_px,
            width_px,
        )
        masks = torch.where(choice[:, :1, None, None] < 0.5, masks, drawn)
    return torch.where(choice[:, 1:, None, None] < EVERYTHING, 1.0, masks)


def boxes(uniform: Tensor, count: Tensor, height_px: int, width_px: int) -> Tensor:
    """uniform: (B, n, 4) and count: (B,) in [0, 1) -> (B, 1, height_px, width_px), 1 within any of 1 to n boxes."""
    size = 0.1 + 0.4 * uniform[..., :2]
    start = uniform[..., 2:] * (1 - size)
    y, x = (_positions(length, uniform) for length in (height_px, width_px))
    rows = (y >= start[..., :1]) & (y < (start + size)[..., :1])
    columns = (x >= start[..., 1:]) & (x < (start + size)[..., 1:])
    return _any(rows[..., :, None] & columns[..., None, :], count, uniform)


def strokes(points: Tensor, widths: Tensor, count: Tensor, height_px: int, width_px: int) -> Tensor:
    """points: (B, n, turns + 1, 2), widths: (B, n), count: (B,), all in [0, 1) -> (B, 1, height_px, width_px), 1 near
    any of 1 to n broken lines: within half a width of one of its segments."""
    y, x = (_positions(length, points) * length for length in (height_px, width_px))
    at = torch.stack(torch.broadcast_tensors(y[:, None], x[None, :]), dim=-1)  # (H, W, 2)
    radius = min(height_px, width_px) * (1 / 12 + widths / 4) / 2
    near = torch.zeros(*points.shape[:2], height_px, width_px, dtype=torch.bool, device=points.device)
    # A bend leads on from the last point, no further than half the picture.
    shares = (points[:, :, :1] + 0.5 * (points[:, :, 1:] - 0.5).cumsum(2)).clamp(0, 1)
    corners = torch.stack([shares[..., 0] * height_px, shares[..., 1] * width_px], dim=-1).unbind(2)
    for first, second in pairwise(corners):
        along = (second - first)[:, :, None, None]
        offset = at - first[:, :, None, None]
        share = (offset * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)
        distance = (offset - share.clamp(0, 1)[..., None] * along).norm(dim=-1)
        near |= distance <= radius[..., None, None]
    return _any(near, count, points)


def _positions(length: int, like: Tensor) -> Tensor:
    """(length,): the middles of the pixels, from 0 to 1."""
    return (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length


def _any(each: Tensor, count: Tensor, like: Tensor) -> Tensor:
    """(B, n, H, W) bool -> (B, 1, H, W): the first 1 to n of them, by count in [0, 1)."""
    number = each.shape[1]
    used = torch.arange(number, device=each.device) <= (count[:, None] * number).long()
    return (each & used[..., None, None]).any(1, keepdim=True).to(like.dtype)


def known_part(mask: Tensor, masked_latent: Tensor) -> Tensor:
    """(B, 1 + C, h, w): what an inpainting UNet is given beside the noisy latent: the mask (B, 1, H, W) at the first
    pixel of each position, as the published ones were trained, and the latent of the picture without its masked
    part (Rombach et al. 2112.10752, section 4.5)."""
    return torch.cat([F.interpolate(mask, masked_latent.shape[2:]), masked_latent], dim=1)
