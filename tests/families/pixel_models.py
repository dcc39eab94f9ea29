"""A small pixel diffusion model with random weights, and what it draws from."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from t2i.config import TextConfig
from t2i.diffusion.config import ScheduleConfig
from t2i.families.pixel_diffusion.config import ClassifierConfig, Config, ObjectiveConfig, SamplingConfig
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i.families.pixel_diffusion.unet_config import UNetConfig
from t2i.interfaces import SampleRequest

ADM = {"dropout": 0.0, "patch_size": 1, "norm_groups": 32, "position_embedding": False, "qk_norm": False}
SMALL = UNetConfig(32, (1, 2), 1, (2,), num_head_channels=16, **ADM)
SAMPLING = SamplingConfig(sampler="ddim", steps=3, guidance_scale=1.0, clip_x0=True, classifier_scale=0.0)
CLASSIFIER = ClassifierConfig(dataclasses.replace(SMALL, patch_size=2), embed_dim=8)
CONFIG = Config(
    denoiser=SMALL,
    text_width=8,
    schedule=ScheduleConfig("cosine"),
    objective=ObjectiveConfig("eps", None),
    variance="fixed_small",
    text=TextConfig("learned", max_tokens=8, width=16, depth=1, heads=2),
    sampling=SAMPLING,
    classifier=None,
)


def build(**changes: Any) -> PixelDiffusion:
    """With random weights throughout, so that zero-initialised layers hide nothing."""
    torch.manual_seed(0)
    model = PixelDiffusion(dataclasses.replace(CONFIG, **changes), 16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, torch.randn(
        2, 3, 16, 16, generator=generator
    )


def request(**changes: Any) -> SampleRequest:
    values: dict[str, Any] = {
        "prompts": ["a red circle", "a blue star"],
        "seeds": [0, 1],
        "height_px": 16,
        "width_px": 16,
    }
    return SampleRequest(**values | changes)
