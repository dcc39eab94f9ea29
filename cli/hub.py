"""Whether a hub of published models is asked: only where text.allow_download says so, or the user's HF_HUB_OFFLINE."""

from __future__ import annotations

import os

_set_here = False


def stay_offline() -> None:
    """Before anything heavy is imported. Every file that a hub does not have would cost half a minute of retries."""
    global _set_here
    if "HF_HUB_OFFLINE" not in os.environ:
        os.environ["HF_HUB_OFFLINE"] = "1"
        _set_here = True


def allow() -> None:
    """Takes `stay_offline` back, once the configuration is known to allow downloads, before its encoder is imported."""
    if _set_here:
        os.environ.pop("HF_HUB_OFFLINE", None)
