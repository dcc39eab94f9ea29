from __future__ import annotations

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from t2i.nn.residual import Downsample, ResidualBlock, Upsample

pytestmark = pytest.mark.usefixtures("float64")

OURS_TO_DIFFUSERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("out_channels", [32, 64])
def test_residual_block_equals_diffusers(out_channels: int) -> None:
    torch.manual_seed(0)
    ours = ResidualBlock(32, out_channels, time_dim=48, dropout=0.0)
    randomize(ours)
    theirs = ResnetBlock2D(in_channels=32, out_channels=out_channels, temb_channels=48, eps=1e-5)
    weights = {}
    for key, value in ours.state_dict().items():
        module, _, parameter = key.rpartition(".")
        weights[f"{OURS_TO_DIFFUSERS[module]}.{parameter}"] = value
    theirs.load_state_dict(weights)
    x, time = torch.randn(2, 32, 6, 5), torch.randn(2, 48)
    torch.testing.assert_close(ours(x, time), theirs(x, time), rtol=1e-9, atol=1e-9)


def test_residual_block_starts_as_the_identity() -> None:
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(ResidualBlock(32, 32, time_dim=8, dropout=0.0)(x, torch.randn(1, 8)), x)


def test_residual_block_drops_out_in_training_only() -> None:
    torch.manual_seed(0)
    block, x, time = (
        ResidualBlock(32, 32, time_dim=8, dropout=0.5),
        torch.randn(1, 32, 4, 4),
        torch.randn(1, 8),
    )
    randomize(block)
    assert not torch.equal(block(x, time), block(x, time))
    block.eval()
    assert torch.equal(block(x, time), block(x, time))


def test_downsample_equals_diffusers() -> None:
    torch.manual_seed(0)
    ours, theirs = Downsample(8), Downsample2D(8, use_conv=True, padding=1)
    theirs.conv.load_state_dict(ours.op.state_dict())
    x = torch.randn(2, 8, 6, 10)
    assert ours(x).shape == (2, 8, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_upsample_equals_diffusers() -> None:
    torch.manual_seed(0)
    ours, theirs = Upsample(8), Upsample2D(8, use_conv=True)
    theirs.conv.load_state_dict(ours.conv.state_dict())
    x = torch.randn(2, 8, 3, 5)
    assert ours(x).shape == (2, 8, 6, 10)
    torch.testing.assert_close(ours(x), theirs(x))
