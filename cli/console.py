"""The one console that verbs write to."""

from __future__ import annotations

import logging
import os

from rich.console import Console

# Lightning starts the further processes of a run with LOCAL_RANK set: only the first one speaks.
is_first_process = int(os.environ.get("LOCAL_RANK", "0")) == 0
console = Console(highlight=False, soft_wrap=True, quiet=not is_first_process)


class _ToConsole(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False)


def say_what_is_logged() -> None:
    """Shows t2i's own log messages, of the first process only, and hushes Lightning's advertisements."""
    if is_first_process:
        logger = logging.getLogger("t2i")
        logger.setLevel(logging.INFO)
        logger.handlers = [_ToConsole()]
        logger.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
