"""Processes that work for this one."""

from __future__ import annotations

import os
import signal


def leave_interrupts() -> None:
    """For processes that work for this one: Ctrl-C, which reaches them too, is for it alone to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
