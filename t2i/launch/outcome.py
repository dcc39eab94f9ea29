"""What the script of a job asks when its processes are gone: did they stop to be started again, or fail?"""

from __future__ import annotations

import os
from contextlib import suppress

VARIABLE = "T2I_OUTCOME"  # a file, set by the job's script
STOPPED, FAILED = "stopped", "failed"


def in_job() -> bool:
    """Whether this process is one of a job that t2i submitted."""
    return VARIABLE in os.environ


def tell(word: str, said: str = "") -> None:
    """Adds a line to the file, where this process belongs to a job. Where the system refuses that, as on a full disk,
    the job ends without having said why: what this process prints counts more."""
    if place := os.environ.get(VARIABLE):
        with suppress(OSError), open(place, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{word} {said}\n")
