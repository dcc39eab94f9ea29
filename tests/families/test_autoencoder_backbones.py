"""ViT-VQGAN's transformers and DALL-E's networks against transformers, and their published sizes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i.errors import ConfigError
from t2i.families.autoencoder.backbone_config import DVAEBackboneConfig, ViTBackboneConfig, ViTConfig
from t2i.families.autoencoder.codec import build_codec
from t2i.families.autoencoder.dvae import (
    DVAEDecoder,
    DVAEEncoder,
    ResBlock,
    convolution,
    logit_laplace_loss,
    mapped,
    picture,
)
from t2i.families.autoencoder.vit import ViTBlock, ViTDecoder, ViTEncoder
from t2i.nn.blocks import blocks_of

pytestmark = pytest.mark.usefixtures("float64")

STACK = ViTConfig(width=32, depth=2, num_heads=4, head_dim=8)
VIT = ViTBackboneConfig("vit", patch_px=8, resolution_px=48, latent_channels=4, encoder=STACK, decoder=STACK)
DVAE = DVAEBackboneConfig("dvae", width=8, blocks_per_group=2, latent_channels=6)


def randomised(module: nn.Module) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("size", "stack", "parameters"),
    [
        ("small", ViTConfig(512, 8, 8, 64), 51_661_315),
        ("base", ViTConfig(768, 12, 12, 64), 171_925_251),
        ("large", ViTConfig(1280, 32, 16, 64), 1_178_343_683),
    ],
)
def test_published_sizes_of_vit_vqgan(compose_run, size, stack, parameters):
    """Of the encoder and the decoder with their positions, without codes and the linear layers around them."""
    config = compose_run("stage=autoencoder", f"backbone=vit_{size}", "resolution='256'").model.backbone
    assert config.encoder == config.decoder == stack
    with torch.device("meta"):
        assert count(ViTEncoder(config), ViTDecoder(config)) == parameters


@pytest.mark.parametrize(("backbone", "kind", "repeated"), [("vit", ViTBlock, 8), ("dvae", ResBlock, 16)])
def test_repeated_modules_are_blocks_of_their_own(compose_run, backbone, kind, repeated):
    """Else checkpointing runs a whole network again at a time, and saves nothing."""
    config = compose_run("stage=autoencoder", f"backbone={backbone}").model
    with torch.device("meta"):
        assert sum(isinstance(block, kind) for block in blocks_of(build_codec(config))) == repeated


def theirs_of(ours: nn.Module, patches: nn.Module | None) -> Any:
    """transformers' ViT with our weights."""
    from transformers import ViTConfig as Config
    from transformers import ViTModel

    config = Config(
        hidden_size=STACK.width,
        num_hidden_layers=STACK.depth,
        num_attention_heads=STACK.num_heads,
        intermediate_size=4 * STACK.width,
        qkv_bias=False,
        image_size=VIT.resolution_px,
        patch_size=VIT.patch_px,
        layer_norm_eps=1e-5,
    )
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    names |= {f"attn.to_{part}": f"attention.{part}_proj" for part in "qkv"} | {
        "attn.to_out.0": "attention.o_proj"
    }
    weights = theirs.state_dict()
    for name, value in ours.state_dict().items():
        if name == "positions":
            weights["embeddings.position_embeddings"][:, 1:] = value.flatten(2).transpose(1, 2)
        elif name.startswith("norm."):
            weights["layer" + name] = value
        else:
            _, layer, rest = name.split(".", 2)
            module, _, parameter = rest.rpartition(".")
            weights[f"layers.{layer}.{names[module]}.{parameter}"] = value
    if patches is not None:
        for name, value in patches.state_dict().items():
            weights[f"embeddings.patch_embeddings.projection.{name}"] = value
    theirs.load_state_dict(weights)
    return theirs


def run(theirs: Any, tokens: Tensor) -> Tensor:
    for layer in theirs.layers:
        tokens = layer(tokens, None)
    return theirs.layernorm(tokens)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 64)], ids=["training size", "interpolated"])
def test_vit_equals_transformers(height, width):
    encoder, decoder = randomised(ViTEncoder(VIT)), randomised(ViTDecoder(VIT))
    theirs = theirs_of(encoder.transformer, encoder.patches)
    image = torch.randn(2, 3, height, width)
    grid = (height // 8, width // 8)
    expected = run(
        theirs, theirs.embeddings(image, interpolate_pos_encoding=True)[:, 1:]
    )  # but for the class token
    actual = encoder(image)
    assert actual.shape == (2, 32, *grid)
    assert (actual.flatten(2).transpose(1, 2) - expected).abs().max() < 1e-12
    latent = torch.randn(2, 32, *grid)
    theirs = theirs_of(decoder.transformer, None)
    tokens = latent.flatten(2).transpose(1, 2)
    places = torch.cat([tokens[:, :1], tokens], dim=1)
    tokens = run(theirs, tokens + theirs.embeddings.interpolate_pos_encoding(places, height, width)[:, 1:])
    # A patch is a linear function of its position's vector.
    pixels = tokens @ decoder.pixels.weight.flatten(1) + decoder.pixels.bias.repeat_interleave(64)
    expected = F.fold(pixels.transpose(1, 2), (height, width), 8, stride=8)
    assert (decoder(latent) - expected).abs().max() < 1e-12


def test_positions_start_as_sines_and_cosines():
    """1706.03762, section 3.5: of columns in the first half of the channels, of rows in the second."""
    table = ViTEncoder(VIT).transformer.positions[0]
    for row, column in ((0, 0), (1, 3), (4, 2)):
        angles = [[place / 10_000 ** (i / 8) for i in range(8)] for place in (column, row)]
        expected = [f(angle) for each in angles for f in (math.sin, math.cos) for angle in each]
        assert table[:, row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_published_sizes_of_dalle(compose_run):
    """2102.12092: the last convolution of the encoder and the weight of the first one of the decoder included."""
    config = compose_run("stage=autoencoder", "backbone=dvae", "resolution='256'").model.backbone
    with torch.device("meta"):
        encoder, decoder = DVAEEncoder(config), DVAEDecoder(config)
        assert count(encoder, convolution(8 * config.width, 8192, 1)) == 53_786_240
    assert count(decoder) + 8192 * config.latent_channels == 43_829_766


@torch.no_grad()
def test_the_encoder_of_dalle_equals_flava():
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    theirs = randomised(FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=20)))
    encoder, output = DVAEEncoder(DVAE), convolution(64, 20, 1)
    weights = {
        name.replace(".group.", ".").replace(".path.", "."): value
        for name, value in theirs.state_dict().items()
    }
    output.load_state_dict({name: weights.pop(f"blocks.output.conv.{name}") for name in ("weight", "bias")})
    encoder.load_state_dict(weights)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    # FLAVA's processor maps pixels in [0, 1] as DALL-E does.
    expected = theirs(0.8 * (image + 1) / 2 + 0.1)
    assert (output(encoder(image)) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_the_logit_laplace_density():
    """2102.12092, equation 2: it is a density over (0, 1), and its middle is the picture."""
    mu, ln_b = torch.tensor(0.3), torch.tensor(-0.7)
    x = (torch.arange(400_000) + 0.5) / 400_000
    image = (x - 0.5) / 0.4  # `mapped` of which is x
    statistics = torch.stack([mu, mu, mu, ln_b, ln_b, ln_b]).view(1, 6, 1, 1)
    each = torch.stack([logit_laplace_loss(statistics, v.expand(1, 3, 1, 1)) for v in image[::4000]])
    expected = (x.logit() - mu).abs() / ln_b.exp() + (2 * ln_b.exp() * x * (1 - x)).log()
    assert (each - expected[::4000]).abs().max() < 1e-9
    assert (-expected).exp().mean().item() == pytest.approx(1, abs=1e-4)
    assert mapped(picture(statistics))[0, 0, 0, 0].item() == pytest.approx(
        torch.sigmoid(mu).item(), abs=1e-12
    )


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("backbone=vit", "backbone.encoder.width=30"), "backbone.encoder.width is 30"),
        (("backbone=vit", "backbone.decoder.depth=0"), "backbone.decoder.depth is 0"),
        (("backbone=vit", "backbone.resolution_px=60"), "backbone.resolution_px is 60"),
        (("backbone=dvae", "backbone.width=6"), "backbone.width is 6"),
        (("backbone=dvae", "resolution.size_px=36"), "resolution.size_px is 36"),
    ],
)
def test_bad_values_are_named(compose_run, overrides, key):
    def build() -> None:
        config = compose_run("stage=autoencoder", *overrides)
        config.model.check_resolution(config.resolution.size_px)

    with pytest.raises(ConfigError, match=re.escape(key)):
        build()
