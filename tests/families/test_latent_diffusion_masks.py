"""Inpainting is learned: the masks, what the UNet is given, and where it starts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from t2i.families.latent_diffusion.config import UNetDenoiserConfig
from t2i.families.latent_diffusion.masks import EVERYTHING, boxes, known_part, random_masks, strokes
from t2i.families.latent_diffusion.unet import UNet
from t2i.training.randomness import Randomness

SMALL = UNetDenoiserConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_heads=2,
    use_linear_in_transformer=False,
    context_dim=8,
)


def randomness(*positions: int) -> Randomness:
    return Randomness(0, torch.tensor(positions), torch.float64)


@pytest.mark.parametrize("kind", ["lama", "rectangles"])
def test_masks_depend_on_the_samples_position_alone(kind: Any) -> None:
    many = random_masks(kind, randomness(*range(200)), 24, 32)
    assert many.shape == (200, 1, 24, 32)
    assert set(many.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(random_masks(kind, randomness(7, 3), 24, 32), many[[7, 3]])
    share = many.mean((1, 2, 3))
    assert share.min() > 0
    assert (share == 1).double().mean().item() == pytest.approx(EVERYTHING, abs=0.07)
    assert 0.1 < share[share < 1].mean() < 0.6
    assert len({tuple(mask.flatten().tolist()) for mask in many[share < 1]}) > 160


def test_kinds_differ_where_lama_draws_strokes() -> None:
    lama, rectangles = (
        random_masks(kind, randomness(*range(100)), 32, 32) for kind in ("lama", "rectangles")
    )
    same = (lama == rectangles).flatten(1).all(1).double().mean()
    assert 0.3 < same < 0.7


def test_a_box_is_where_it_says() -> None:
    uniform = torch.tensor([[[0.5, 0.25, 0.0, 0.5], [0.0, 0.0, 0.9, 0.9]]], dtype=torch.float64)
    first = boxes(uniform, torch.tensor([0.0]), 20, 20)  # 0.3 x 0.2 of the sides, at 0 and 0.4
    expected = torch.zeros(1, 1, 20, 20, dtype=torch.float64)
    expected[0, 0, 0:6, 8:12] = 1
    assert torch.equal(first, expected)
    assert boxes(uniform, torch.tensor([0.9]), 20, 20).sum() > first.sum()


def test_a_stroke_is_as_wide_as_it_says() -> None:
    points = torch.full((1, 1, 3, 2), 0.5, dtype=torch.float64)  # stays in the middle: a disc
    width = 120 * (1 / 12 + 0.5 / 4)
    disc = strokes(points, torch.full((1, 1), 0.5), torch.zeros(1), 120, 160)
    assert disc.sum().item() == pytest.approx(torch.pi * width**2 / 4, rel=0.03)
    assert disc[0, 0, 60, 80] == 1


def test_what_is_known_is_in_the_published_order() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, 1:5] = 1  # seen at the first pixel of each position alone
    latent = torch.randn(1, 4, 2, 2)
    known = known_part(mask, latent)
    assert known[0, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert torch.equal(known[:, 1:], latent)


def test_an_ordinary_unet_is_the_start_of_one_that_inpaints() -> None:
    """It says the same whatever the mask: 5 channels of zeros were added to its first convolution."""
    torch.manual_seed(0)
    plain = UNet(dataclasses.replace(SMALL, in_channels=4)).eval()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inpainting = UNet(dataclasses.replace(SMALL, in_channels=9)).eval()
    inpainting.load_state_dict(inpainting.fitted(plain.state_dict()))
    assert not inpainting.input_blocks[0][0].weight[:, 4:].any()  # type: ignore[index]
    x, t, text = torch.randn(2, 9, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 3, 8)
    torch.testing.assert_close(inpainting(x, t, text), plain(x[:, :4], t, text), rtol=1e-4, atol=1e-5)
