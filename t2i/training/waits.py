"""How long the steps of a run wait for their batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from t2i.training.ranges import part_of_step


class DataWait:
    """Calling it gives a context within which a batch is waited for. On a GPU what counts is the time in which that,
    too, had nothing left to do: it is the GPU that tells the times, so that the host does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits: list[tuple[Any, Any]] = []  # begin and end: seconds, or the GPU's events

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = self._now()
        with part_of_step("data"):
            yield
        self.waits.append((began, self._now()))

    def take_s(self) -> float:
        """Seconds since the last call; a GPU has done all its work by now."""
        waits, self.waits = self.waits, []
        if self.device.type == "cuda":
            return sum(began.elapsed_time(end) for began, end in waits) / 1000
        return sum(end - began for began, end in waits)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
