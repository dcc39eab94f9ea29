"""Pictures that start from a picture or a given noise, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pixel_models import SAMPLING, SMALL, build, pictures, request

from t2i.diffusion.config import ScheduleConfig
from t2i.errors import ConfigError

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "heun"])
def test_draws_anew_where_the_mask_is_and_keeps_the_rest(sampler: str) -> None:
    model, image = build(), pictures()[0]
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :, 8:], mask[1, :, 4:8] = 1, 1
    sampling = dataclasses.replace(SAMPLING, sampler=sampler)
    found = model.generate(request(image=image, mask=mask, strength=1.0), sampling)
    drawn = mask.bool().expand(-1, 3, -1, -1)
    assert torch.equal(found[~drawn], image[~drawn])
    plain = model.generate(request(), sampling)  # from the same noise: what is kept is seen on the way
    assert (found - plain)[drawn].abs().max() > 1e-3


@pytest.mark.parametrize("tile", ["x", "y", "xy"])
def test_a_tiling_picture_of_moved_noise_is_the_moved_picture(tile: str) -> None:
    model, noise = build(), pictures()[1]
    by = [8 * (axis in tile) for axis in "yx"]
    first = model.generate(request(noise=noise, tile=tile), SAMPLING)
    moved = model.generate(request(noise=noise.roll(by, (2, 3)), tile=tile), SAMPLING)
    torch.testing.assert_close(moved, first.roll(by, (2, 3)), rtol=0, atol=1e-10)
    assert not torch.allclose(model.generate(request(noise=noise), SAMPLING), first, atol=1e-3)
    if tile != "xy":
        by.reverse()
        across = model.generate(request(noise=noise.roll(by, (2, 3)), tile=tile), SAMPLING)
        assert not torch.allclose(across, first.roll(by, (2, 3)), atol=1e-3)


def test_a_network_that_knows_its_place_does_not_tile() -> None:
    model = build(denoiser=dataclasses.replace(SMALL, position_embedding=True))
    with pytest.raises(ConfigError, match=r"tile is 'x'; allowed: none with this model"):
        model.generate(request(tile="x"), SAMPLING)


def test_a_picture_and_its_noise() -> None:
    """The error falls as the steps grow."""
    schedule = ScheduleConfig("scaled_linear", beta_start=0.00085, beta_end=0.012)
    model, image = build(schedule=schedule), pictures()[0]
    with torch.no_grad():
        model.denoiser.unet.out[2].weight *= 0.05  # smooth, as what was trained is
    errors = []
    for steps in (10, 80):
        sampling = dataclasses.replace(SAMPLING, clip_x0=False, steps=steps, guidance_scale=4.0)
        noise = model.invert(request(image=image), sampling)
        plain = dataclasses.replace(sampling, guidance_scale=1.0)
        errors.append((model.generate(request(noise=noise), plain) - image).abs().mean().item())
    assert errors[1] < errors[0] / 2
