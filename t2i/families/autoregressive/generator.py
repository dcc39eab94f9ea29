"""Prompts to pictures with a trained autoregressive model."""

from __future__ import annotations

import torch

from t2i.config import parse_run
from t2i.families.autoregressive.config import Config
from t2i.families.autoregressive.model import model_of
from t2i.families.generator import ModelGenerator
from t2i.training.checkpoint import LoadedCheckpoint


class Generator(ModelGenerator):
    """Of a run of this family."""

    def __init__(self, checkpoint: LoadedCheckpoint, device: torch.device | str | None = None) -> None:
        model = model_of(parse_run(checkpoint.config, Config), checkpoint.extra)
        super().__init__(model, model.size_px, model.config.sampling, checkpoint, device)
        if model.low is not None:
            model.low.text.to(self.device)
