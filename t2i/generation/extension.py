"""Pictures that are drawn on a larger canvas: what is added on each side. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2i.schema import check

SIDES = ("left", "right", "top", "bottom")
STRENGTH = 0.8  # of a picture to start from


def around(extend: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) that is added. extend: pixels by side"""
    left, right, top, bottom = (extend.get(side, 0) for side in SIDES)
    return top + bottom, left + right


def within(whole: tuple[int, int], extend: Mapping[str, int], key: str, given: Any) -> tuple[int, int]:
    """(height, width) that is left for the picture. Raises ConfigError where nothing is.

    whole: (height, width); key, given: as the person knows `extend`
    """
    height, width = around(extend)
    inner = whole[0] - height, whole[1] - width
    check(min(inner) >= 1, key, given, f"less than the whole, {whole[0]} x {whole[1]} px (height x width)")
    return inner


def usual_strength(keeps_a_part: bool) -> float:
    """All of the way where a part of the picture stays, by a mask or around it."""
    return 1.0 if keeps_a_part else STRENGTH
