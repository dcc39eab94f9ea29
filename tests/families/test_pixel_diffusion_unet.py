"""ADM's UNet and classifier: published sizes to the digit, and outputs equal to diffusers'."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from t2i import config as configuration
from t2i.errors import ConfigError
from t2i.families.pixel_diffusion.classifier import NoisyEncoder
from t2i.families.pixel_diffusion.model import build_denoiser
from t2i.families.pixel_diffusion.unet import AttentionBlock, ResBlock, UNet
from t2i.families.pixel_diffusion.unet_config import UNetConfig
from t2i.text.architecture import build_architecture

pytestmark = pytest.mark.usefixtures("float64")

CLASSES = 1000
ADM = {"dropout": 0.0, "patch_size": 1, "norm_groups": 32, "position_embedding": False, "qk_norm": False}
ADM_64 = UNetConfig(192, (1, 2, 3, 4), 3, (2, 4, 8), num_head_channels=64, **ADM)
ADM_128 = UNetConfig(256, (1, 1, 2, 3, 4), 2, (4, 8, 16), num_heads=4, **ADM)
ADM_256 = UNetConfig(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), num_head_channels=64, **ADM)
ADM_512 = UNetConfig(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), num_head_channels=64, **ADM)
UP_256 = UNetConfig(192, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), num_heads=4, **ADM)
UP_512 = UNetConfig(192, (1, 1, 2, 2, 4, 4), 2, (16, 32), num_head_channels=64, **ADM)

SMALL = UNetConfig(32, (1, 2, 2), 1, (2, 4), num_head_channels=16, **ADM)
ADDED_TIME = dataclasses.replace(SMALL, scale_shift_norm=False, resblock_updown=False, num_res_blocks=2)
SHAPES = pytest.mark.parametrize("config", [SMALL, ADDED_TIME], ids=["adm", "ddpm"])


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(config: UNetConfig, condition_dim: int | None = None, context_dim: int | None = None) -> UNet:
    """With random weights throughout, so that zero-initialised layers hide nothing."""
    torch.manual_seed(0)
    unet = UNet(config, 3, 6, condition_dim, context_dim).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return unet


def noisy(height: int = 16, width: int = 8) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


TIMES = torch.tensor([17.0, 803.0], dtype=torch.float32)  # as diffusers embeds them


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("config", "in_channels", "parameters"),
    [
        (ADM_64, 3, 295_904_454),
        (ADM_128, 3, 421_529_606),
        (ADM_256, 3, 553_838_086),
        (ADM_512, 3, 558_997_638),
        (UP_256, 6, 311_795_910),
        (UP_512, 6, 308_835_270),
    ],
    ids=["64", "128", "256", "512", "64 to 256", "128 to 512"],
)
def test_published_sizes(config: UNetConfig, in_channels: int, parameters: int) -> None:
    """A class is a one-hot vector here."""
    with torch.device("meta"):
        assert count(UNet(config, in_channels, 6, CLASSES)) == parameters


def test_glide_is_adm_at_64_px_with_text() -> None:
    """GLIDE's filtered base model of 385,030,726, less its text transformer and that one's embeddings, positions,
    padding and last norm; its pooled text has a bias."""
    width, vocabulary, tokens = 512, 50_257, 128
    with torch.device("meta"):
        unet = count(UNet(ADM_64, 3, 6, width, width))
    text = 50_438_144 + vocabulary * width + 2 * tokens * width + 2 * width
    assert unet + 4 * ADM_64.model_channels + text == 385_030_726


@pytest.mark.parametrize(
    ("size_px", "channel_mult", "blocks", "attention", "parameters"),
    [
        (64, (1, 2, 3, 4), 4, (2, 4, 8), 65_438_568),
        (128, (1, 1, 2, 3, 4), 2, (4, 8, 16), 42_568_040),
        (256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), 54_096_360),
        (512, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), 54_448_360),
    ],
)
def test_published_sizes_of_classifiers(
    size_px: int, channel_mult: tuple[float, ...], blocks: int, attention: tuple[int, ...], parameters: int
) -> None:
    config = UNetConfig(128, channel_mult, blocks, attention, num_head_channels=64, **ADM)
    with torch.device("meta"):
        assert count(NoisyEncoder(config, size_px, CLASSES)) == parameters


def diffusers_kwargs(config: UNetConfig) -> dict[str, Any]:
    levels = range(len(config.channel_mult))
    attends = [2**level in config.attention_resolutions for level in levels]
    last = len(config.channel_mult) - 1
    how = "resnet" if config.resblock_updown else "conv"
    plain_down = "ResnetDownsampleBlock2D" if config.resblock_updown else "DownBlock2D"
    plain_up = "ResnetUpsampleBlock2D" if config.resblock_updown else "UpBlock2D"
    assert attends[last]  # UNet2DModel's last level then ends without a downsampling of its own
    return {
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": tuple(config.channels()),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple("AttnDownBlock2D" if a else plain_down for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else plain_up for a in reversed(attends)),
        "downsample_type": how,
        "upsample_type": how,
        "attention_head_dim": config.num_head_channels,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "norm_eps": 1e-5,
        "attn_norm_num_groups": 32,
        "num_class_embeds": CLASSES,
    }


RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
    "norm": "group_norm",
    "proj_out": "to_out.0",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def diffusers_module(name: str, unet: UNet) -> str:
    """The name that diffusers gives to one of our modules."""
    if name in ENDS:
        return ENDS[name]
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        return f"mid_block.{MIDDLE[match[1]]}.{RESIDUAL.get(match[2], match[2])}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    assert match is not None, name
    way = {"input": "down", "output": "up"}[match[1]]
    # A level ends with its downsampling on the way down, with one more residual block on the way up.
    level, layer = divmod(int(match[2]) - (way == "down"), unet.config.num_res_blocks + 1)
    inner = RESIDUAL.get(match[4], match[4])
    module = unet.get_submodule(f"{match[1]}_blocks.{match[2]}.{match[3]}")
    if isinstance(module, AttentionBlock):
        return f"{way}_blocks.{level}.attentions.{layer}.{inner}"
    if isinstance(module, ResBlock) and module.resample is None:
        return f"{way}_blocks.{level}.resnets.{layer}.{inner}"
    sampler = f"{way}_blocks.{level}.{way}samplers.0"
    if isinstance(module, ResBlock):
        # An upsampling block without attention keeps it under another name.
        return f"{sampler}.{inner}"
    return f"{sampler}.conv"


def diffusers_weights(unet: UNet) -> dict[str, Tensor]:
    weights = {}
    for key, value in unet.state_dict().items():
        module, _, parameter = key.rpartition(".")
        place = diffusers_module(module, unet)
        if module.endswith("qkv"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                weights[f"{place.removesuffix('qkv')}to_{name}.{parameter}"] = part
        elif module == "label_emb":
            weights[f"{place}.{parameter}"] = value.T.contiguous()
        else:
            weights[f"{place}.{parameter}"] = value
    return weights


@SHAPES
@torch.no_grad()
def test_outputs_are_those_of_diffusers(config: UNetConfig) -> None:
    unet = build(config, CLASSES)
    reference = UNet2DModel(**diffusers_kwargs(config)).eval()
    reference.load_state_dict(diffusers_weights(unet))
    classes = torch.tensor([3, 700])
    expected = reference(noisy(), TIMES, class_labels=classes).sample
    actual = unet(noisy(), TIMES, nn.functional.one_hot(classes, CLASSES).double())
    assert relative_error(actual, expected) < 1e-10
    other = unet(noisy(), TIMES, nn.functional.one_hot(classes.flip(0), CLASSES).double())
    assert relative_error(other, expected) > 1e-3  # the class is seen


@SHAPES
@torch.no_grad()
def test_starts_at_zero(config: UNetConfig) -> None:
    torch.manual_seed(0)
    unet = UNet(config, 3, 6, 8, 8)
    assert not unet(noisy(), TIMES, torch.randn(2, 8), torch.randn(2, 5, 8)).any()


@torch.no_grad()
def test_masked_tokens_are_not_seen() -> None:
    unet = build(SMALL, 8, 12)
    condition, context = torch.randn(2, 8), torch.randn(2, 5, 12)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    out = unet(noisy(), TIMES, condition, context, mask)
    changed = context.clone()
    changed[0, 2:] = 7.0
    assert torch.equal(out, unet(noisy(), TIMES, condition, changed, mask))
    cut = unet(noisy()[:1], TIMES[:1], condition[:1], context[:1, :2])
    assert relative_error(out[:1], cut) < 1e-10
    changed[1, 4] = 7.0
    assert not torch.allclose(out[1], unet(noisy(), TIMES, condition, changed, mask)[1])
    nothing = unet(noisy(), TIMES, condition, context, torch.zeros_like(mask))
    assert torch.isfinite(nothing).all()


@torch.no_grad()
def test_patches_are_channels() -> None:
    """With patches the network is the same one over a picture rearranged."""
    config = dataclasses.replace(SMALL, patch_size=2)
    unet = build(config, 8)
    inner = UNet(dataclasses.replace(SMALL), 12, 24, 8).eval()
    inner.load_state_dict(unet.state_dict())
    condition = torch.randn(2, 8)
    x = noisy(16, 24)
    expected = nn.functional.pixel_shuffle(inner(nn.functional.pixel_unshuffle(x, 2), TIMES, condition), 2)
    assert relative_error(unet(x, TIMES, condition), expected) < 1e-12
    assert config.downsampling == 8


def test_a_picture_that_does_not_halve_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="16 x 10; both must be multiples of 4"):
        build(SMALL)(noisy(16, 10), TIMES)


def test_without_cross_attention_tokens_are_not_seen() -> None:
    unet = build(dataclasses.replace(SMALL, cross_attention=False), 8, 12)
    assert not [name for name, _ in unet.named_parameters() if "encoder_kv" in name]


@SHAPES
def test_muon_gets_no_embedding_input_or_output(config: UNetConfig) -> None:
    unet = build(config, 8, 12)
    chosen = {id(p) for p in unet.hidden_matrices()}
    left = {name for name, p in unet.named_parameters() if id(p) not in chosen and p.ndim >= 2}
    assert {re.sub(r"^.*emb_layers", "emb_layers", name) for name in left} == {
        "time_embed.0.weight",
        "time_embed.2.weight",
        "label_emb.weight",
        "input_blocks.0.0.weight",
        "emb_layers.1.weight",
        "out.2.weight",
    }


@torch.no_grad()
def test_positions_and_normalised_queries_change_the_output_only_where_asked() -> None:
    plain = build(SMALL, 8)
    weights = plain.state_dict()
    x, condition = noisy(), torch.randn(2, 8)
    for key in ("position_embedding", "qk_norm"):
        other = UNet(dataclasses.replace(SMALL, **{key: True}), 3, 6, 8).eval()
        other.load_state_dict(weights, strict=False)
        assert relative_error(other(x, TIMES, condition), plain(x, TIMES, condition)) > 1e-4


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model_channels", {"model_channels": 0}),
        ("model_channels", {"model_channels": 33}),
        ("channel_mult", {"channel_mult": ()}),
        ("channel_mult", {"channel_mult": (1, 0)}),
        ("channel_mult", {"channel_mult": (0.3, 1, 1)}),
        ("num_res_blocks", {"num_res_blocks": 0}),
        ("patch_size", {"patch_size": 0}),
        ("norm_groups", {"norm_groups": 0}),
        ("attention_resolutions", {"attention_resolutions": (3,)}),
        ("attention_resolutions", {"attention_resolutions": (16,)}),
        ("num_heads", {"num_heads": 4}),
        ("num_heads", {"num_head_channels": None}),
        ("num_heads", {"num_heads": 7, "num_head_channels": None}),
        ("num_head_channels", {"num_head_channels": 48}),
        ("dropout", {"dropout": 1.0}),
    ],
)
def test_config_refuses(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^denoiser\.{key} is .*; allowed: "):
        dataclasses.replace(SMALL, **change)


def test_config_survives_a_plain_mapping() -> None:
    assert configuration.parse(UNetConfig, configuration.to_dict(ADM_512)) == ADM_512


EXPERIMENTS = {
    # parameters with 1,000 classes, steps, pictures a step (2105.05233, table 11) and processes
    "adm/64": (295_904_454, 540_000, 2048, 32),
    "adm/128": (421_529_606, 4_360_000, 256, 8),
    "adm/256": (553_838_086, 1_980_000, 256, 32),
    "adm/512": (558_997_638, 1_940_000, 256, 64),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_as_large_and_as_long_as_published(name: str, compose_run: Any) -> None:
    """Less the class embedding, plus what reads the caption."""
    parameters, steps, batch_size, processes = EXPERIMENTS[name]
    config = compose_run(f"experiment={name}")
    with torch.device("meta"):
        text = build_architecture(config.model.text)
        denoiser = build_denoiser(config.model, text.token_dim, text.pooled_dim)
    shape, width = config.model.denoiser, config.model.text_width
    attended = [m.qkv.in_features for m in denoiser.modules() if isinstance(m, AttentionBlock)]
    of_text = 4 * shape.model_channels * text.pooled_dim + 2 * text.pooled_dim
    of_text += 2 * text.token_dim + (text.token_dim + 1) * width + sum(2 * c * (width + 1) for c in attended)
    assert count(denoiser) == parameters - CLASSES * 4 * shape.model_channels + of_text
    trainer = config.trainer
    assert trainer.devices * trainer.num_nodes == processes
    assert trainer.global_batch_size == trainer.batch_size * processes == batch_size
    assert trainer.num_images == steps * batch_size
    half_life_steps = config.ema.half_life_images / batch_size
    assert 0.5 ** (1 / half_life_steps) == pytest.approx(0.9999, abs=1e-6)


def test_the_classifier_named_after_adms_is_as_large(compose_run: Any) -> None:
    config = compose_run("stage=pixel_diffusion", "classifier=adm_64")
    with torch.device("meta"):
        encoder = NoisyEncoder(config.model.classifier.encoder, 64, CLASSES)
    assert count(encoder) == 65_438_568
