"""The networks of a run, for `t2i plan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i.config import RunConfig
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.model import build_codec
from t2i.families.autoregressive.network import CodeTransformer
from t2i.families.autoregressive.plan_drawing import planned_drawing
from t2i.families.tokens import alike, grid_of, planned_codec, rows_drawn
from t2i.interfaces import PlannedNetwork
from t2i.text.architecture import build_architecture


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    with torch.device("meta"):
        codec = build_codec(model, builds_on["codec"])
        text = build_architecture(model.text)
        grid = grid_of(codec, size, size, ("resolution.size_px", "resolution.size_px"))
        length = model.text.max_tokens
        transformer = CodeTransformer(model.transformer, codec.num_codes, grid, text.token_dim, length)

    def given(batch: int) -> dict[str, Tensor]:
        return {
            "codes": torch.zeros(batch, grid[0] * grid[1] - 1, dtype=torch.int64),
            "tokens": torch.empty(batch, length, text.token_dim, requires_grad=text.trainable),
            "mask": torch.ones(batch, length, dtype=torch.bool),
        }

    rows = rows_drawn(model.sampling)

    def text_inputs(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(batch, length, dtype=torch.int64)}

    return [
        PlannedNetwork(
            "transformer",
            transformer,
            given,
            trained=True,
            hidden=transformer.hidden_matrices(),
            drawing=planned_drawing(transformer, length, text.token_dim, rows),
        ),
        *(planned_codec(codec, size) if model.palette is None else ()),
        PlannedNetwork(
            "text encoder",
            text.network,
            text_inputs,
            trained=text.trainable,
            cached_as=None if text.trainable else "text",
            by_block=False,
            drawing=alike(1, lambda: text.network(**text_inputs(rows))),
        ),
    ]
