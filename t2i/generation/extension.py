"""Pictures that are drawn on a larger canvas: what is added on each side. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from t2i.errors import ConfigError
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


@contextmanager
def keeping_its_size(height_and_width: str) -> Iterator[None]:
    """Around a model's check of a picture that is extended as it is: where it refuses the size of the whole, what a
    person can do is added to its sentence. height_and_width: as the person knows them"""
    try:
        yield
    except ConfigError as error:
        said = str(error)
        if not said.startswith(("height is ", "width is ")):
            raise
        raise ConfigError(
            f"{said.removesuffix('.')}: extend by other pixels, or say {height_and_width} of the whole, to which the "
            "picture is cut."
        ) from error


def usual_strength(keeps_a_part: bool) -> float:
    """All of the way where a part of the picture stays, by a mask or around it."""
    return 1.0 if keeps_a_part else STRENGTH
