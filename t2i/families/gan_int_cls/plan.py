"""The networks of a run, for `t2i plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from t2i.config import RunConfig
from t2i.families.gan_int_cls.config import Config
from t2i.families.gan_int_cls.model import build_networks
from t2i.planned import PlannedNetwork
from t2i.text.architecture import build_architecture


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`. A backward pass is taken for two forward passes."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    with torch.device("meta"):
        text = build_architecture(model.text)
        generator, discriminator = build_networks(model, text.pooled_dim, size)
    generated = 1.5 if model.interpolation_weight else 1.0  # per picture in the generator's turn
    penalty = (
        1 / model.r1_every if model.r1_weight else 0.0
    )  # a backward pass through one and its forward pass
    return [
        PlannedNetwork(
            "generator",
            generator.eval(),  # batch norm trains on no batch of one
            lambda batch: {
                "noise": torch.empty(batch, model.generator.noise_dim),
                "pooled": torch.empty(batch, text.pooled_dim),
            },
            trained=True,
            calls_per_image=generated + 1 / 3,  # and forward alone, in the discriminator's turn
            turn="generator",
        ),
        PlannedNetwork(
            "discriminator",
            discriminator.eval(),
            lambda batch: {
                "image": torch.empty(batch, 3, size, size),
                "pooled": torch.empty(batch, text.pooled_dim),
            },
            trained=True,
            # In its turn a picture and a generated one; in the generator's without its own gradients.
            calls_per_image=2 + penalty + generated * 2 / 3,
            averaged=False,
            by_block=False,
            turn="discriminator",
        ),
        PlannedNetwork(
            "text encoder",
            text.network,
            lambda batch: {"input_ids": torch.zeros(batch, model.text.max_tokens, dtype=torch.int64)},
            trained=False,
            cached_as="text",
        ),
    ]
