"""What `t2i plan` counts of the run at a lower resolution, whose codes super-resolution is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from t2i.config import ModelConfig, RunConfig, TextConfig, parse_run
from t2i.planned import PlannedNetwork

Plan = Callable[[RunConfig, Mapping[str, Mapping[str, Any]]], list[PlannedNetwork]]


def low_networks(
    plan: Plan, config: type[ModelConfig], low: Mapping[str, Any] | None, text: TextConfig | None
) -> list[PlannedNetwork]:
    """Its networks, frozen. Training runs its codec's encoder alone; drawing all but the codec, as no picture is made
    of the codes.

    plan, config: the family's; low: "config" and "extra" as `t2i.families.family.Family.plan` has them, None without
        such a run; text: of the encoder of the run that builds on it, where it has one
    """
    if low is None:
        return []
    run = parse_run(low["config"], config)
    found = []
    for network in plan(run, low["extra"]):
        if network.cached_as == "text" and run.model.text_encoder() == text:
            continue  # one encoder for both, which keeps what it made of a caption
        of_codec = network.cached_as == "codes"
        found.append(
            replace(
                network,
                name=f"low {network.name}",
                trained=False,
                hidden=(),
                calls_per_image=network.calls_per_image if of_codec else 0,
                cached_as="low_codes" if of_codec else None,
                saved=network.saved or network.trained,
                drawing=() if of_codec else network.drawing,
            )
        )
    return found
