from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor, nn

from t2i import config as configuration
from t2i.errors import ConfigError
from t2i.families.latent_diffusion.unet import UNet
from t2i.families.latent_diffusion.unet_config import UNetConfig

pytestmark = pytest.mark.usefixtures("float64")

SD1 = UNetConfig(320, (1, 2, 4, 4), 2, (1, 2, 4), num_heads=8, use_linear_in_transformer=False)
SD2 = dataclasses.replace(
    SD1, num_heads=None, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True
)
LDM_1_45B = dataclasses.replace(SD1, context_dim=1280)

# Two levels with transformers, one without.
SMALL_SD1 = UNetConfig(32, (1, 2, 2), 2, (1, 2), num_heads=2, context_dim=24, use_linear_in_transformer=False)
SMALL_SD2 = dataclasses.replace(
    SMALL_SD1,
    num_heads=None,
    num_head_channels=16,
    use_linear_in_transformer=True,
    transformer_depth=2,
    num_res_blocks=1,
    in_channels=5,
    out_channels=3,
)
SMALL = pytest.mark.parametrize("config", [SMALL_SD1, SMALL_SD2], ids=["sd1", "sd2"])


def build(config: UNetConfig) -> UNet:
    """With random weights throughout, so that zero-initialised layers hide nothing."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return unet


def inputs(config: UNetConfig, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, height, width, generator=generator)
    context = torch.randn(2, 7, config.context_dim, generator=generator)
    return x, torch.tensor([17.0, 803.5], dtype=torch.float32), context  # the times as diffusers embeds them


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def diffusers_kwargs(config: UNetConfig) -> dict[str, Any]:
    levels = range(len(config.channel_mult))
    channels = tuple(config.model_channels * mult for mult in config.channel_mult)
    attends = [2**level in config.attention_resolutions for level in levels]
    heads = tuple(config.num_heads or c // config.num_head_channels for c in channels)  # type: ignore[operator]
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": channels,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        "attention_head_dim": heads,  # diffusers' name for the number of heads
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "use_linear_projection": config.use_linear_in_transformer,
    }


RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {0: "resnets.0", 1: "attentions.0", 2: "resnets.1"}


def diffusers_module(module: str, config: UNetConfig) -> str:
    """The name that diffusers gives to one of our modules."""
    if module in ENDS:
        return ENDS[module]
    if match := re.fullmatch(r"middle_block\.(\d)\.(.+)", module):
        place, inner = f"mid_block.{MIDDLE[int(match[1])]}", match[2]
    else:
        match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", module)
        assert match is not None, module
        inner = match[4]
        way = {"input": "down", "output": "up"}[match[1]]
        # A level ends with its downsampling on the way down, with one more residual block on the way up.
        index = int(match[2]) - (way == "down")
        level, layer = divmod(index, config.num_res_blocks + 1)
        if inner in ("op", "conv"):
            return f"{way}_blocks.{level}.{way}samplers.0.conv"
        place = f"{way}_blocks.{level}.{'attentions' if match[3] == '1' else 'resnets'}.{layer}"
    return f"{place}.{RESIDUAL.get(inner, inner)}"


def diffusers_weights(unet: UNet) -> dict[str, Tensor]:
    weights = {}
    for key, value in unet.state_dict().items():
        module, _, parameter = key.rpartition(".")
        weights[f"{diffusers_module(module, unet.config)}.{parameter}"] = value
    return weights


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(SD1, 859_520_964), (SD2, 865_910_724), (LDM_1_45B, 872_300_484)],
    ids=["sd1", "sd2", "ldm-1.45b"],
)
def test_published_sizes(config: UNetConfig, parameters: int) -> None:
    with torch.device("meta"):
        unet = UNet(config)
    assert sum(p.numel() for p in unet.parameters()) == parameters


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
def test_full_size_has_the_modules_and_shapes_of_diffusers(config: UNetConfig) -> None:
    with torch.device("meta"):
        unet = UNet(config)
        theirs = UNet2DConditionModel(**diffusers_kwargs(config))
    ours = {key: value.shape for key, value in diffusers_weights(unet).items()}
    assert ours == {key: value.shape for key, value in theirs.state_dict().items()}
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            reference = theirs.get_submodule(diffusers_module(name, config))
            assert module.eps == reference.eps, name
            assert getattr(module, "num_groups", None) == getattr(reference, "num_groups", None), name


@SMALL
def test_names_are_compvis_as_diffusers_reads_them(config: UNetConfig) -> None:
    unet = build(config)
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": config.num_res_blocks})
    ours = diffusers_weights(unet)
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[key], ours[key]) for key in ours)


@SMALL
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_equals_diffusers(config: UNetConfig, height: int, width: int, masked: bool) -> None:
    unet = build(config)
    theirs = UNet2DConditionModel(**diffusers_kwargs(config)).eval()
    theirs.load_state_dict(diffusers_weights(unet))
    x, t, context = inputs(config, height, width)
    mask = torch.arange(7) < torch.tensor([[3], [6]]) if masked else None
    actual = unet(x, t, context, mask)
    expected = theirs(x, t, context, encoder_attention_mask=mask).sample
    assert actual.shape == (2, config.out_channels, height, width)
    assert relative_error(actual, expected) < 1e-9


@SMALL
def test_every_parameter_learns(config: UNetConfig) -> None:
    unet = build(config).train()
    unet(*inputs(config)).square().mean().backward()
    silent = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@SMALL
def test_starts_with_zero_at_the_end_of_each_branch_and_nowhere_else(config: UNetConfig) -> None:
    torch.manual_seed(0)
    unet = UNet(config)
    zero = {name for name, p in unet.named_parameters() if name.endswith("weight") and not p.any()}
    ends = re.compile(r"out\.2\.weight|.+\.(out_layers\.3|proj_out)\.weight")
    assert zero == {name for name, _ in unet.named_parameters() if ends.fullmatch(name)}
    assert not unet(*inputs(config)).any()


@SMALL
@torch.no_grad()
def test_channels_last_changes_the_layout_only(config: UNetConfig) -> None:
    unet = build(config)
    x, t, context = inputs(config, 8, 12)
    expected = unet(x, t, context)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    strays = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, args, name=name: (
                    None if args[0].is_contiguous(memory_format=torch.channels_last) else strays.append(name)
                )
            )
    actual = unet(x.to(memory_format=torch.channels_last), t, context)
    assert strays == []
    assert relative_error(actual, expected) < 1e-9


@torch.no_grad()
def test_a_caption_that_is_masked_out_whole_gives_finite_values() -> None:
    unet = build(SMALL_SD1)
    x, t, context = inputs(SMALL_SD1)
    mask = torch.tensor([[False] * 7, [True] * 7])
    out = unet(x, t, context, mask)
    assert torch.isfinite(out).all()
    assert torch.equal(out[0], unet(x, t, torch.randn_like(context), mask)[0])
    assert relative_error(out[1], unet(x, t, context)[1]) < 1e-9


@SMALL
@torch.no_grad()
def test_bfloat16_is_close_as_autocast_and_as_weights(config: UNetConfig) -> None:
    unet = build(config)
    x, t, context = inputs(config)
    expected = unet(x, t, context)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(unet(x, t, context).float(), expected) < 0.05
    # The times stay float32: bfloat16 could not tell 803 from 804.
    half = unet.bfloat16()(x.bfloat16(), t, context.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), expected) < 0.05


def test_dropout_acts_in_training() -> None:
    unet = build(dataclasses.replace(SMALL_SD1, dropout=0.3))
    x, t, context = inputs(SMALL_SD1)
    assert torch.equal(unet(x, t, context), unet(x, t, context))
    unet.train()
    assert not torch.equal(unet(x, t, context), unet(x, t, context))


def test_a_latent_that_does_not_halve_evenly_is_refused() -> None:
    unet = build(SMALL_SD1)
    x, t, context = inputs(SMALL_SD1, 8, 10)
    with pytest.raises(ValueError, match="8 x 10; both must be multiples of 4"):
        unet(x, t, context)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("in_channels", {"in_channels": 0}),
        ("out_channels", {"out_channels": 0}),
        ("model_channels", {"model_channels": 0}),
        ("model_channels", {"model_channels": 48}),
        ("channel_mult", {"channel_mult": ()}),
        ("channel_mult", {"channel_mult": (1, 0)}),
        ("num_res_blocks", {"num_res_blocks": 0}),
        ("attention_resolutions", {"attention_resolutions": (3,)}),
        ("attention_resolutions", {"attention_resolutions": (16,)}),
        ("num_heads", {"num_heads": None}),
        ("num_heads", {"num_head_channels": 64}),
        ("num_heads", {"num_heads": 7}),
        ("num_head_channels", {"num_heads": None, "num_head_channels": 0}),
        ("num_head_channels", {"num_heads": None, "num_head_channels": 96}),
        ("transformer_depth", {"transformer_depth": 0}),
        ("context_dim", {"context_dim": 0}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
    ],
)
def test_config_refuses(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^denoiser\.{key} is .*; allowed: "):
        dataclasses.replace(SD1, **change)


def test_config_survives_a_plain_mapping() -> None:
    values = configuration.to_dict(SD2)
    assert configuration.parse(UNetConfig, values) == SD2
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    assert configuration.parse(UNetConfig, listed) == SD2


@SMALL
def test_muon_gets_no_embedding_input_or_output(config):
    unet = build(config)
    chosen = {id(p) for p in unet.hidden_matrices()}
    left = {name for name, p in unet.named_parameters() if id(p) not in chosen and p.ndim >= 2}
    assert {re.sub(r"^.*emb_layers", "emb_layers", name) for name in left} == {
        "time_embed.0.weight",
        "time_embed.2.weight",
        "input_blocks.0.0.weight",
        "emb_layers.1.weight",
        "out.2.weight",
    }
