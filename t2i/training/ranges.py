"""The parts of a train step, as ranges that torch.profiler shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import profiler

from t2i.launch import watch

PARTS = ("data", "copy", "forward", "backward", "optimizer")
PREFIX = "step: "  # of the ranges' names


def part_of_step(name: str) -> AbstractContextManager[None]:
    """Within this context the time is that of the part, one of PARTS, for the watch over the processes too. Where a
    profiler runs, the host waits at the end for what a GPU has to do."""
    watch.doing(name)
    return _range(name) if profiler._is_profiler_enabled else nullcontext()


@contextmanager
def _range(name: str) -> Iterator[None]:
    with profiler.record_function(PREFIX + name):
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
