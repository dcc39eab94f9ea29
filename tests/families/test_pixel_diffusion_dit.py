"""Pixel diffusion by a transformer instead of a UNet."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from t2i import config as configuration
from t2i.errors import ConfigError
from t2i.families.pixel_diffusion.config import Config
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i.interfaces import SampleRequest

pytestmark = pytest.mark.usefixtures("float64")


def test_it_sees_the_caption_and_takes_sides_of_whole_patches(compose_run: Any) -> None:
    config = compose_run("experiment=pixel_diffusion/tiny_flow_dit").model
    torch.manual_seed(0)
    model = PixelDiffusion(config, 32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    image, eps, t = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.9])
    losses = [
        model.losses(image, model.text(["a red circle", other]), t, eps)["loss"] for other in ("", "a star")
    ]
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert losses[0][1] != losses[1][1]
    request = SampleRequest(prompts=["a star"], seeds=[0], height_px=16, width_px=24)
    assert model.generate(request, config.sampling).shape == (1, 3, 16, 24)
    with pytest.raises(ConfigError, match=r"^width is 20; allowed: multiples of 8 with this model"):
        model.generate(dataclasses.replace(request, width_px=20), config.sampling)


def test_it_learns_no_variance(compose_run: Any) -> None:
    config = compose_run("experiment=pixel_diffusion/tiny_cosine_learned").model
    denoiser = compose_run("experiment=pixel_diffusion/tiny_flow_dit").model.denoiser
    with pytest.raises(ConfigError, match=r"^variance is 'learned'; allowed: .* with denoiser.name=dit"):
        dataclasses.replace(config, denoiser=denoiser)


def test_a_run_from_before_denoisers_had_names_has_the_unet(compose_run: Any) -> None:
    config = compose_run("experiment=pixel_diffusion/tiny_cosine_learned")
    values = configuration.to_dict(config.model)
    del values["denoiser"]["name"]
    upgraded = Config.upgraded(values)
    assert "name" not in values["denoiser"]
    assert configuration.parse(Config, upgraded) == config.model
