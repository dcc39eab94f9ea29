"""Aspect-ratio buckets: shapes of about one area, so that a batch has the same pixel budget in each (SDXL, 2307.01952,
section 2.3 and appendix I)."""

from __future__ import annotations

import numpy as np


def bucket_shapes(size_px: int, step_px: int, max_aspect: float) -> list[tuple[int, int]]:
    """(height, width) of every bucket, the square first: sides that are multiples of `step_px`, the longer one the
    longest with which the area is at most size_px^2 and at most `max_aspect` times the shorter one. `size_px` is a
    multiple of `step_px`. With 1024, 64 and 4, shapes of SDXL's appendix I."""
    shapes = [(size_px, size_px)]
    for short in range(size_px - step_px, 0, -step_px):
        long = size_px * size_px // short // step_px * step_px
        if long > max_aspect * short:
            break
        shapes += [(short, long), (long, short)]
    return shapes


def assign(original_px: np.ndarray, shapes: list[tuple[int, int]]) -> np.ndarray:
    """(n, 2) heights and widths -> (n,) int16, the bucket whose aspect ratio is nearest in its logarithm, so that a
    picture and its transpose are treated alike; the square for sizes that are unknown (0)."""
    aspects, bucket_of = np.unique(
        np.log([height / width for height, width in shapes]), return_index=True
    )  # in order, so that the nearest is one of two
    known = (original_px > 0).all(axis=1)
    wanted = np.zeros(len(original_px))
    wanted[known] = np.log(original_px[known, 0] / original_px[known, 1])
    above = np.searchsorted(aspects, wanted).clip(max=len(aspects) - 1)
    below = (above - 1).clip(min=0)
    to_below, to_above = wanted - aspects[below], aspects[above] - wanted
    nearest = np.where(np.abs(to_below) < np.abs(to_above), bucket_of[below], bucket_of[above])
    equal = np.abs(to_below) == np.abs(to_above)
    nearest[equal] = np.minimum(bucket_of[below], bucket_of[above])[equal]
    return nearest.astype(np.int16)
