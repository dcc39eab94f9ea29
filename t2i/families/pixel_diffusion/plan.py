"""The networks of a run, for `t2i plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.config import RunConfig
from t2i.families.pixel_diffusion.config import Config
from t2i.families.pixel_diffusion.model import CHANNELS, build_classifier, build_denoiser, check_side
from t2i.planned import PlannedNetwork
from t2i.text.architecture import build_architecture


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    check_side(model, size, "resolution.size_px")
    with torch.device("meta"):
        text = build_architecture(model.text)
        denoiser = build_denoiser(model, text.token_dim, text.pooled_dim)
        classifier = build_classifier(model, size, text.token_dim)
    length = model.text.max_tokens

    def noisy(batch: int) -> dict[str, Tensor]:
        return {
            "x": torch.empty(batch, CHANNELS, size, size),
            "t": torch.empty(batch),
            "context": torch.empty(batch, length, text.token_dim),
            "context_mask": torch.ones(batch, length, dtype=torch.bool),
        }

    def denoised(batch: int) -> dict[str, Tensor]:
        given = noisy(batch) | {"pooled": torch.empty(batch, text.pooled_dim)}
        for name in ("context", "pooled"):
            given[name].requires_grad_(text.trainable)
        return given

    networks = [
        PlannedNetwork("denoiser", denoiser, denoised, trained=True, hidden=denoiser.hidden_matrices())
    ]
    if classifier is not None:
        hidden = classifier.encoder.hidden_matrices()
        networks.append(
            PlannedNetwork(
                "classifier",
                classifier,
                noisy,
                trained=True,
                hidden=hidden,
                by_block=False,
                turn="classifier",
            )
        )
    networks.append(
        PlannedNetwork(
            "text encoder",
            text.network,
            lambda batch: {"input_ids": torch.zeros(batch, length, dtype=torch.int64)},
            trained=text.trainable,
            cached_as=None if text.trainable else "text",
            by_block=False,
        )
    )
    return networks
