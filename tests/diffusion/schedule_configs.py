"""Schedules as the tests have them: Stable Diffusion's betas on either line, and times that are not shifted."""

from __future__ import annotations

from typing import Any

from t2i.diffusion.config import ScheduleConfig


def needed(name: str) -> dict[str, Any]:
    """What a schedule of this name has to say."""
    if name in ("linear", "scaled_linear"):
        return {"beta_start": 0.00085, "beta_end": 0.012}
    return {"shift": 1.0} if name == "flow" else {}


def schedule_config(name: str, **options: Any) -> ScheduleConfig:
    return ScheduleConfig(**{"name": name} | needed(name) | options)
