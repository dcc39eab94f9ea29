"""Prompts to pictures with a trained autoregressive model."""

from __future__ import annotations

import torch

from t2i.config import parse_run
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.model import Autoregressive, build_codec
from t2i.families.generator import ModelGenerator
from t2i.training.checkpoint import LoadedCheckpoint


class Generator(ModelGenerator):
    """Of a run of this family."""

    def __init__(self, checkpoint: LoadedCheckpoint, device: torch.device | str | None = None) -> None:
        config = parse_run(checkpoint.config, Config)
        assert isinstance(config.model, Config)
        size_px = config.resolution.size_px
        codec = build_codec(config.model, checkpoint.extra["codec"])
        model = Autoregressive(config.model, codec, size_px)
        super().__init__(model, size_px, config.model.sampling, checkpoint, device)
