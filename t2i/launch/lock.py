"""A folder that one process at a time may write to."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from t2i.errors import UserError
from t2i.launch.ranks import job_name

NAME = ".lock"
PAUSE_S = 0.2


@contextmanager
def locked(folder: Path, patience_s: float = 15.0) -> Iterator[None]:
    """Holds the folder's lock; the system frees it when this process ends, however it does.

    patience_s: a process that was killed leaves helpers that take a few seconds to end, and a job that is started again
        may meet its former self
    Raises UserError, which names the host, job and process that hold it.
    """
    path = folder / NAME
    with path.open("a+") as file:
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
                    break
                if time.monotonic() - began > patience_s:
                    file.seek(0)
                    raise UserError(
                        f"{folder} is written by {_who(file.read())}; allowed: one at a time."
                    ) from None
                time.sleep(PAUSE_S)
        file.seek(0)
        file.truncate()
        json.dump({"host": platform.node(), "job": job_name(os.environ), "process": os.getpid()}, file)
        file.flush()
        yield


def _who(text: str) -> str:
    try:
        held = json.loads(text)
        job = f", job {held['job']}" if held["job"] else ""
        return f"process {held['process']} on {held['host']}{job}"
    except (ValueError, KeyError, TypeError):
        return "another process"
