"""PixArt's transformer against diffusers, with the same weights under the same names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from t2i.errors import ConfigError
from t2i.families.latent_diffusion.config import PixArtConfig
from t2i.families.latent_diffusion.pixart import PixArt

pytestmark = pytest.mark.usefixtures("float64")

CONFIG = PixArtConfig("pixart", width=48, depth=3, heads=4, base_size=8)
CHANNELS, CONTEXT, LENGTH = 4, 24, 7


def build(config: PixArtConfig = CONFIG) -> PixArt:
    """With random weights throughout, so that zero-initialised layers hide nothing."""
    torch.manual_seed(0)
    pixart = PixArt(config, CHANNELS, CONTEXT).eval()
    with torch.no_grad():
        for parameter in pixart.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return pixart


def reference(config: PixArtConfig = CONFIG, out_channels: int = CHANNELS, context_dim: int = CONTEXT):
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=CHANNELS,
        out_channels=out_channels,
        num_layers=config.depth,
        cross_attention_dim=config.width,
        sample_size=config.base_size * config.patch_size,
        patch_size=config.patch_size,
        interpolation_scale=config.interpolation_scale,
        use_additional_conditions=False,
        caption_channels=context_dim,
    ).eval()


def inputs(height: int = 16, width: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, CHANNELS, height, width, generator=generator),
        "t": torch.tensor([17.0, 803.0], dtype=torch.float32),  # as diffusers embeds it
        "context": torch.randn(2, LENGTH, CONTEXT, generator=generator),
        "context_mask": torch.arange(LENGTH) < torch.tensor([[3], [LENGTH]]),
    }


def assert_close(ours: Tensor, theirs: Tensor, share: float = 1e-9) -> None:
    """To this share of the largest value."""
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 8), (32, 32), (8, 24), (24, 16)])
@pytest.mark.parametrize("changes", [{}, {"interpolation_scale": 2.0}, {"patch_size": 4, "base_size": 4}])
@torch.no_grad()
def test_agrees_with_diffusers(changes, height, width, masked):
    config = dataclasses.replace(CONFIG, **changes)
    ours, theirs, given = build(config), reference(config), inputs(height, width)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if not masked:
        given["context_mask"] = None
    wanted = theirs(
        given["x"],
        encoder_hidden_states=given["context"],
        timestep=given["t"],
        encoder_attention_mask=given["context_mask"],
    ).sample
    # Positions on other grids than the square one diffusers works out in float32 by another route.
    assert_close(ours(**given), wanted, 1e-9 if height == width else 1e-5)


@torch.no_grad()
def test_published_weights_load_without_the_variance():
    """They put out twice the channels, of which samplers take the first half."""
    theirs, given = reference(out_channels=2 * CHANNELS), inputs()
    weights = dict(theirs.state_dict())
    for name in ("proj_out.weight", "proj_out.bias"):
        weights[name] = weights[name].unflatten(0, (-1, 2 * CHANNELS))[:, :CHANNELS].flatten(0, 1)
    ours = PixArt(CONFIG, CHANNELS, CONTEXT).eval()
    ours.load_state_dict(weights, strict=True)
    wanted = theirs(
        given["x"],
        encoder_hidden_states=given["context"],
        timestep=given["t"],
        encoder_attention_mask=given["context_mask"],
    ).sample.chunk(2, dim=1)[0]
    assert_close(ours(**given), wanted)


def test_xl_2_is_as_large_as_diffusers():
    config = PixArtConfig("pixart")
    with torch.device("meta"):
        ours, theirs = PixArt(config, CHANNELS, 4096), reference(config, context_dim=4096)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in ours.parameters()) == 610_856_096 - 16 * 1153  # published with the variance


def test_starts_with_zero_and_every_parameter_learns():
    assert PixArt(CONFIG, CHANNELS, CONTEXT)(**inputs()).eq(0).all()
    pixart = build()
    pixart(**inputs()).square().mean().backward()
    silent = [name for name, p in pixart.named_parameters() if p.grad is None or p.grad.eq(0).all()]
    assert silent == []


def test_muon_steps_attention_and_mlps_only():
    pixart = build()
    hidden = {id(p) for p in pixart.hidden_matrices()}
    names = [name for name, p in pixart.named_parameters() if id(p) in hidden]
    assert len(names) == CONFIG.depth * 10
    assert all("attn" in name or ".ff." in name for name in names)
    assert all(p.ndim == 2 for p in pixart.hidden_matrices())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 50}, "denoiser.width is 50; allowed: a multiple of heads (4)"),
        ({"depth": 0}, "denoiser.depth is 0"),
        ({"interpolation_scale": 0.0}, "denoiser.interpolation_scale is 0.0"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, says):
    with pytest.raises(ConfigError) as raised:
        dataclasses.replace(CONFIG, **changes)
    assert says in str(raised.value)
