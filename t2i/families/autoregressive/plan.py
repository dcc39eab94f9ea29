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
from t2i.families.autoregressive.plan_drawing import planned_drawing, planned_low
from t2i.families.low_plan import low_networks
from t2i.families.tokens import grid_of, planned_codec, rows_drawn
from t2i.planned import PlannedNetwork, alike
from t2i.text.architecture import build_architecture


def planned_networks(config: RunConfig, builds_on: Mapping[str, Mapping[str, Any]]) -> list[PlannedNetwork]:
    """See `t2i.families.family.Family`."""
    model, size = config.model, config.resolution.size_px
    assert isinstance(model, Config)
    with torch.device("meta"):
        codec = build_codec(model, builds_on.get("codec", {}))
        words = model.transformer.conditioning == "words"
        text = None if words else build_architecture(model.text)
        text_dim = 1 if text is None else text.token_dim
        grid = grid_of(codec, size, size, ("resolution.size_px", "resolution.size_px"))
        length = model.text.max_tokens
        model.sampling.check_codes(codec.num_codes)
        code_dim, shape = codec.code_vectors().shape[1], model.transformer
        transformer = CodeTransformer(shape, codec.num_codes, grid, text_dim, length, model.low, code_dim)

    def given(batch: int) -> dict[str, Tensor]:
        return {
            "codes": torch.zeros(batch, grid[0] * grid[1] - 1, dtype=torch.int64),
            "tokens": torch.zeros(batch, length, text_dim, requires_grad=text is not None and text.trainable),
            "mask": torch.ones(batch, length, dtype=torch.bool),
            **planned_low(batch, transformer.low),
        }

    rows = rows_drawn(model.sampling)

    def text_inputs(batch: int) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(batch, length, dtype=torch.int64)}

    networks = [
        PlannedNetwork(
            "transformer",
            transformer,
            given,
            trained=True,
            hidden=transformer.hidden_matrices(),
            drawing=planned_drawing(transformer, length, text_dim, rows),
        ),
        *(planned_codec(codec, size) if model.palette is None else ()),
    ]
    if text is not None:
        network = text.network
        networks.append(
            PlannedNetwork(
                "text encoder",
                network,
                text_inputs,
                trained=text.trainable,
                cached_as=None if text.trainable else "text",
                by_block=False,
                drawing=alike(1, lambda: network(**text_inputs(rows))),
            )
        )
    return networks + low_networks(
        planned_networks, Config, builds_on.get("low"), None if words else model.text
    )
