"""Prompts to pictures with a trained pixel diffusion model."""

from __future__ import annotations

import torch
from torch import Tensor

from t2i.config import parse_run
from t2i.families.pixel_diffusion.config import Config, SamplingConfig
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i.interfaces import Progress, SampleRequest
from t2i.training.checkpoint import LoadedCheckpoint, load_into


class Generator:
    """A `t2i.interfaces.Generator` over a checkpoint's averaged weights."""

    def __init__(self, checkpoint: LoadedCheckpoint, device: torch.device | str | None = None) -> None:
        config = parse_run(checkpoint.config, Config)
        assert isinstance(config.model, Config)
        self.default_size_px = config.resolution.size_px
        self.sampling: SamplingConfig = config.model.sampling
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = PixelDiffusion(config.model, self.default_size_px).eval()
        load_into(self.model, checkpoint.weights, checkpoint.path, prefix="model.")
        self.model.to(self.device)
        self.model.text.to(self.device)

    def generate(self, request: SampleRequest, progress: Progress | None = None) -> Tensor:
        """See `t2i.interfaces.Generator`."""
        return self.model.generate(request, self.sampling, progress).float().cpu()
