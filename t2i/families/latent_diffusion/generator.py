"""Prompts to pictures with a trained latent diffusion model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2i.config import parse_run
from t2i.families.latent_diffusion.config import Config, SamplingConfig
from t2i.families.latent_diffusion.stage import build_model
from t2i.interfaces import SampleRequest
from t2i.training.checkpoint import LoadedCheckpoint, load_into


class Generator:
    """A `t2i.interfaces.Generator` over a checkpoint's averaged weights."""

    def __init__(self, checkpoint: LoadedCheckpoint, device: torch.device | str | None = None) -> None:
        config = parse_run(checkpoint.config, Config)
        self.default_size_px = config.resolution.size_px
        self.defaults: SamplingConfig = config.model.sampling
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = build_model(config.model, checkpoint.extra["codec"]).eval()
        load_into(self.model, checkpoint.weights, checkpoint.path, prefix="model.")
        self.model.to(self.device)
        self.model.text.to(self.device)

    def generate(self, request: SampleRequest, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """See `t2i.interfaces.Generator`; progress is called with (steps done, steps)."""
        return self.model.generate(request, progress).float().cpu()
