"""The networks of a run, for `t2i plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.config import RunConfig
from t2i.families.codec import token_codec
from t2i.families.low_plan import low_networks
from t2i.families.masked.config import Config
from t2i.families.masked.model import build_transformer, check_sampling
from t2i.families.tokens import grid_of, planned_codec, rows_drawn
from t2i.planned import PlannedNetwork, alike
from t2i.text.architecture import build_architecture


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    with torch.device("meta"):
        codec = token_codec(builds_on["codec"], model.builds_on.codec)
        text = build_architecture(model.text)
        shape = grid_of(codec, size, size, ("resolution.size_px", "resolution.size_px"))
        check_sampling(model.sampling, codec.num_codes, shape)
        transformer = build_transformer(model, codec, shape, text.token_dim, text.pooled_dim)
    length = model.text.max_tokens

    def low(batch: int) -> dict[str, Tensor]:
        side = model.low.side if model.low else 0
        return {"low": torch.zeros(batch, side, side, dtype=torch.int64)} if side else {}

    def asked(batch: int) -> dict[str, Tensor]:
        return {
            "tokens": torch.zeros(batch, *shape, dtype=torch.int64),
            "context": torch.empty(batch, length, text.token_dim, requires_grad=text.trainable),
            "context_mask": torch.ones(batch, length, dtype=torch.bool),
            "pooled": torch.empty(batch, text.pooled_dim, requires_grad=text.trainable),
            **low(batch),
        }

    rows = rows_drawn(model.sampling)
    with torch.device("meta"):
        seen = asked(rows)  # by all steps

    def text_inputs(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(batch, length, dtype=torch.int64)}

    return [
        PlannedNetwork(
            "transformer",
            transformer,
            asked,
            trained=True,
            hidden=transformer.hidden_matrices(),
            drawing=alike(model.sampling.steps, lambda: transformer(**seen)),
        ),
        *planned_codec(codec, size),
        PlannedNetwork(
            "text encoder",
            text.network,
            text_inputs,
            trained=text.trainable,
            cached_as=None if text.trainable else "text",
            by_block=False,
            drawing=alike(1, lambda: text.network(**text_inputs(rows))),
        ),
        *low_networks(planned_networks, Config, builds_on.get("low"), model.text),
    ]
