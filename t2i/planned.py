"""What a family's plan says of drawing, beside `t2i.interfaces.PlannedNetwork`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlannedCalls:
    """Calls of a network while one picture is drawn. What they compute and read grows evenly from first to last.

    count: how many
    first, last: run these, on the current default device, for one picture (and its unconditional half, under guidance)
    cached: how many numbers of keys and values, kept from earlier calls and added by this one, the first and the last
        attend to, beside what `t2i.nn.once` keeps
    after: the call before them in the same walk: what `t2i.nn.once` keeps of it is there; None: nothing is
    """

    count: int
    first: Callable[[], Tensor]
    last: Callable[[], Tensor]
    cached: tuple[int, int] = (0, 0)
    after: Callable[[], Tensor] | None = None


def alike(count: int, run: Callable[[], Tensor]) -> list[PlannedCalls]:
    """So many calls of one walk, all of the very same tensors: those after the first find what `t2i.nn.once` keeps."""
    following = [PlannedCalls(count - 1, run, run, after=run)] if count > 1 else []
    return [PlannedCalls(1, run, run), *following]
