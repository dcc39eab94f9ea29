"""Signals of a cluster that come before the training loop looks for them."""

from __future__ import annotations

import signal
from types import FrameType

STOP = (signal.SIGTERM, signal.SIGUSR1)
received: int | None = None


def note() -> None:
    """From now on a signal that asks to stop is kept for the training loop, and ends nothing. To be called before
    imports that take seconds."""
    for number in STOP:
        signal.signal(number, _keep)


def _keep(number: int, frame: FrameType | None) -> None:
    global received
    received = number
