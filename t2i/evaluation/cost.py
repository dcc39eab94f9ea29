"""What drawing takes: seconds and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


@dataclass
class Cost:
    """Adds up while pictures are drawn.

    memory_gib: the most that was taken at a time: of a GPU by tensors; else by this process, where the system tells
    """

    device: torch.device
    seconds: float = 0.0
    pictures: int = 0
    memory_gib: float | None = None
    _first: tuple[float, int] = field(default=(0.0, 0), repr=False)

    @contextmanager
    def drawing(self, pictures: int) -> Iterator[None]:
        """Around one batch."""
        _forget_most(self.device)
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        if not self.pictures:
            self._first = (seconds, pictures)
        self.seconds += seconds
        self.pictures += pictures
        most = _most_gib(self.device)
        self.memory_gib = most if self.memory_gib is None else max(self.memory_gib, most or 0.0)

    @property
    def seconds_per_picture(self) -> float | None:
        """Without the first batch, which sets things up, where there are others."""
        first_s, first = self._first
        if not self.pictures:
            return None
        if self.pictures == first:
            return self.seconds / self.pictures
        return (self.seconds - first_s) / (self.pictures - first)


def _forget_most(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # Linux: from now on, the most of what follows


def _most_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None
