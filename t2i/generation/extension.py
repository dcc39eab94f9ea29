"""Pictures that are drawn on a larger canvas: what is added on each side. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from t2i.errors import ConfigError
from t2i.schema import check

if TYPE_CHECKING:
    from t2i.interfaces import Generator, SampleRequest

SIDES = ("left", "right", "top", "bottom")
STRENGTH = 0.8  # of a picture to start from
MOST_AWAY = 512  # pixels along a side, to a size that a model takes


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


def check_whole(
    generator: Generator, request: SampleRequest, sampling: Any, extend: Mapping[str, int], said: str
) -> None:
    """A model's check of a picture that is extended as it is. Where it refuses the size of the whole, the nearest size
    that it takes is added to its sentence.

    said: as a person gives a height and a width, such as "--height {} --width {}"
    """
    try:
        generator.check(request, sampling)
    except ConfigError as error:
        if not str(error).startswith(("height is ", "width is ")):
            raise
        size = _nearest(generator, request, sampling, around(extend))
        cut = (
            "" if size is None else f", or say {said.format(*size)} of the whole, to which the picture is cut"
        )
        raise ConfigError(f"{str(error).removesuffix('.')}: extend by other pixels{cut}.") from error


def _nearest(
    generator: Generator, request: SampleRequest, sampling: Any, added: tuple[int, int]
) -> tuple[int, int] | None:
    """(height, width) near the request's that the model takes, larger than what is added; None where none is near."""
    size = [request.height_px, request.width_px]

    def refused() -> str:
        asked = dataclasses.replace(request, height_px=size[0], width_px=size[1], image=None, mask=None)
        try:
            generator.check(asked, sampling)
        except ConfigError as error:
            return str(error).partition(" is ")[0]
        return ""

    for axis, key in [(0, "height"), (1, "width")] * 2:  # what is wrong with one side may hide the other's
        given = size[axis]
        for side in (given + far * sign for far in range(MOST_AWAY) for sign in (1, -1)):
            size[axis] = side
            if side > added[axis] and refused() != key:
                break
    return None if refused() else (size[0], size[1])


def usual_strength(keeps_a_part: bool) -> float:
    """All of the way where a part of the picture stays, by a mask or around it."""
    return 1.0 if keeps_a_part else STRENGTH
