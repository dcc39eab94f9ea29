"""The convolutional encoder and decoder against diffusers' AutoencoderKL and the published size."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from t2i.errors import ConfigError
from t2i.families.autoencoder.model import Decoder, Encoder
from t2i.families.autoencoder.model_config import EncoderDecoderConfig

pytestmark = pytest.mark.usefixtures("float64")


def to_compvis(key: str, num_levels: int) -> str:
    """A key of diffusers' Encoder or Decoder -> CompVis' name of the same tensor."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.attentions", r"down.\1.attn", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    up = re.match(r"up_blocks\.(\d+)\.", key)
    if up:
        level = num_levels - 1 - int(up[1])  # diffusers counts from the lowest resolution
        key = key.replace(up[0], f"up.{level}.").replace("resnets", "block").replace("attentions", "attn")
        key = key.replace("upsamplers.0", "upsample")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    key = key.replace("mid_block.attentions.0", "mid.attn_1")
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for theirs, ours in attention.items():
        key = key.replace(f".{theirs}.", f".{ours}.")
    return key


def load_diffusers(module: nn.Module, source: nn.Module, num_levels: int) -> None:
    own = module.state_dict()
    named = {to_compvis(key, num_levels): value for key, value in source.state_dict().items()}
    module.load_state_dict({key: value.view(own[key].shape) for key, value in named.items()})


@pytest.mark.parametrize(
    ("mult", "attention"),
    [((1, 2, 4), ()), ((1, 2, 2, 4), ()), ((1, 2), (16,))],
    ids=["f4", "f8", "f2 with attention at every block"],
)
def test_equals_diffusers(mult, attention):
    from diffusers import AutoencoderKL

    config = EncoderDecoderConfig(
        32, mult, 2, attention_resolutions=attention, resolution_px=32, latent_channels=4
    )
    has_attention = [32 >> i in attention for i in range(len(mult))]
    torch.manual_seed(0)
    oracle = AutoencoderKL(
        block_out_channels=[32 * m for m in mult],
        down_block_types=[("Attn" if a else "") + "DownEncoderBlock2D" for a in has_attention],
        up_block_types=[("Attn" if a else "") + "UpDecoderBlock2D" for a in reversed(has_attention)],
        layers_per_block=2,
        latent_channels=4,
    ).eval()
    for parameter in oracle.parameters():  # biases and norms too, so that a wrong mapping shows
        nn.init.normal_(parameter, std=0.1)
    encoder, decoder = Encoder(config, out_channels=8).eval(), Decoder(config).eval()
    load_diffusers(encoder, oracle.encoder, len(mult))
    load_diffusers(decoder, oracle.decoder, len(mult))

    image, latent = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        pairs = [(encoder(image), oracle.encoder(image)), (decoder(latent), oracle.decoder(latent))]
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()


def test_parameter_count_of_the_published_f8_autoencoder():
    config = EncoderDecoderConfig(
        128, (1, 2, 4, 4), num_res_blocks=2, latent_channels=4, attention_resolutions=(), resolution_px=256
    )
    with torch.device("meta"):
        modules = [Encoder(config, 8), Decoder(config), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)]
    assert sum(p.numel() for module in modules for p in module.parameters()) == 83_653_863


@pytest.mark.parametrize("mult", [(1,), (1, 1), (1, 1, 2, 2, 4)])
def test_downsampling_factor(mult):
    config = EncoderDecoderConfig(8, mult, 1, resolution_px=32, latent_channels=3, attention_resolutions=())
    f = 2 ** (len(mult) - 1)
    assert config.downsampling == f
    with torch.device("meta"):
        latent = Encoder(config, 3)(torch.zeros(2, 3, 32, 64))
        assert latent.shape == (2, 3, 32 // f, 64 // f)
        assert Decoder(config)(latent).shape == (2, 3, 32, 64)


def test_names_of_published_checkpoints():
    with torch.device("meta"):
        config = EncoderDecoderConfig(
            attention_resolutions=(32,),
            base_channels=128,
            channel_mult=(1, 2, 4, 4),
            num_res_blocks=2,
            resolution_px=256,
            latent_channels=4,
        )
        encoder, decoder = set(Encoder(config, 8).state_dict()), set(Decoder(config).state_dict())
    assert {
        "conv_in.weight",
        "down.0.block.1.norm1.weight",
        "down.1.block.0.nin_shortcut.bias",
        "down.2.downsample.conv.weight",
        "down.3.attn.1.proj_out.weight",
        "mid.attn_1.q.weight",
        "mid.block_2.conv2.bias",
        "norm_out.weight",
        "conv_out.bias",
    } <= encoder
    assert {"up.0.block.2.conv1.weight", "up.3.upsample.conv.weight", "up.3.attn.2.norm.weight"} <= decoder


def test_last_layer_is_the_weight_that_makes_the_picture():
    decoder = Decoder(
        EncoderDecoderConfig(8, (1, 1), 1, attention_resolutions=(), resolution_px=256, latent_channels=4)
    )
    with torch.no_grad():
        decoder.last_layer.zero_()
        picture = decoder(torch.randn(1, 4, 4, 4))
    torch.testing.assert_close(picture, decoder.conv_out.bias.detach().view(1, 3, 1, 1).expand_as(picture))


F8 = EncoderDecoderConfig(128, (1, 2, 4, 4), 2, (), 256, 4)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"base_channels": 12}, "backbone.base_channels"),
        ({"channel_mult": ()}, "backbone.channel_mult"),
        ({"channel_mult": (1, 0)}, "backbone.channel_mult"),
        ({"num_res_blocks": 0}, "backbone.num_res_blocks"),
        ({"resolution_px": 100}, "backbone.resolution_px"),
        ({"attention_resolutions": (48,)}, "backbone.attention_resolutions"),
        ({"latent_channels": 0}, "backbone.latent_channels"),
        ({"dropout": 1.0}, "backbone.dropout"),
    ],
)
def test_bad_values_are_named(values, key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        EncoderDecoderConfig(**dataclasses.asdict(F8) | values)
