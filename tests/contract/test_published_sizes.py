"""Full-size experiments are as large as what they are named after, and their parts combine freely.

On the meta device throughout. What no paper counts is counted from the reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from t2i.config import RunConfig, TextConfig
from t2i.families.autoencoder.codec import build_codec
from t2i.families.latent_diffusion.model import build_denoiser
from t2i.text.architecture import Architecture, build_architecture

CODEC_CHANNELS = 4
STEPS = {  # model cards of Stable Diffusion v1, v2-base and v2; 2112.10752, table 15
    "sd-v1/256": (237_000, 2_048, 64),
    "sd-v1/512-v1-1": (194_000, 2_048, 256),
    "sd-v1/512-v1-2": (515_000, 2_048, 256),
    "sd-v1/512-v1-3": (195_000, 2_048, 256),
    "sd-v1/512-v1-4": (225_000, 2_048, 256),
    "sd-v2-base/256": (550_000, 2_048, 64),
    "sd-v2-base/512": (850_000, 2_048, 256),
    "sd-v2/512-v": (150_000, 2_048, 256),
    "sd-v2/768-v": (140_000, 2_048, 256),
    "ldm-1p45b/256": (390_000, 680, 8),
}
CONTINUES = {
    "sd-v1/256": None,
    "sd-v1/512-v1-1": "sd-v1/256",
    "sd-v1/512-v1-2": "sd-v1/512-v1-1",
    "sd-v1/512-v1-3": "sd-v1/512-v1-2",
    "sd-v1/512-v1-4": "sd-v1/512-v1-2",
    "sd-v2-base/256": None,
    "sd-v2-base/512": "sd-v2-base/256",
    "sd-v2/512-v": "sd-v2-base/512",
    "sd-v2/768-v": "sd-v2/512-v",
    "ldm-1p45b/256": None,
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@cache
def text_network(config: TextConfig) -> Architecture:
    with torch.device("meta"):
        return build_architecture(config)


def denoiser(config: RunConfig) -> nn.Module:
    text = text_network(config.model.text)
    with torch.device("meta"):
        return build_denoiser(config.model.denoiser, CODEC_CHANNELS, text.token_dim, text.pooled_dim)


def unet_with_context(width: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            cross_attention_dim=width, attention_head_dim=8
        )  # 8 heads, by its history

    return build


def pixart_xl_2() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(sample_size=32, out_channels=4, caption_channels=4096)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd-v1/256", 859_520_964),
        ("sd-v1/512-v1-4", 859_520_964),
        ("sd-v2-base/512", 865_910_724),
        ("sd-v2/768-v", 865_910_724),
        ("ldm-1p45b/256", 872_300_484),
        ("sd-t5/256", unet_with_context(4096)),
        ("pixart-xl/256", pixart_xl_2),
    ],
)
def test_denoisers(name, expected, compose_run):
    if callable(expected):
        with torch.device("meta"):
            expected = count(expected())
    assert count(denoiser(compose_run(f"experiment={name}"))) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd-v1/256", 123_060_480),  # CLIP ViT-L/14
        (
            "sd-v2/768-v",
            354_032_640,
        ),  # OpenCLIP ViT-H/14; tests/text counts it from the reference, as these two:
        ("ldm-1p45b/256", 542_895_360),
        ("pixart-xl/256", 4_762_310_656),
    ],
)
def test_text_encoders(name, expected, compose_run):
    assert count(text_network(compose_run(f"experiment={name}").model.text).network) == expected


def test_ldm_has_1_45_billion_parameters(compose_run):
    """With the layer that turns states into words again, which CompVis' checkpoint holds and nothing uses."""
    config = compose_run("experiment=ldm-1p45b/256")
    unused = 30_522 * 1280 + 30_522
    total = count(denoiser(config)) + count(text_network(config.model.text).network) + unused
    assert round(total / 1e9, 2) == 1.45


def levels(kind: str, mults: list[int], num_with_attention: int) -> list[str]:
    """diffusers' names of the blocks, from full resolution down; the lowest ones have attention."""
    plain = len(mults) - num_with_attention
    return [kind] * plain + [f"Attn{kind}"] * num_with_attention


@pytest.mark.parametrize(
    ("name", "mults", "num_with_attention", "channels", "codes"),
    [
        ("kl_f4", [1, 2, 4], 0, 3, None),
        ("kl_f8", [1, 2, 4, 4], 0, 4, None),
        ("kl_f16", [1, 1, 2, 2, 4], 1, 16, None),
        ("kl_f32", [1, 1, 2, 2, 4, 4], 2, 64, None),
        ("vq_f4", [1, 2, 4], 0, 3, 8_192),
        ("vq_f8", [1, 2, 2, 4], 1, 4, 16_384),
        ("vq_f16", [1, 1, 2, 2, 4], 1, 8, 16_384),
        ("vqgan_f16_1024", [1, 1, 2, 2, 4], 1, 256, 1_024),
        ("vqgan_f16_16384", [1, 1, 2, 2, 4], 1, 256, 16_384),
    ],
)
def test_autoencoders(name, mults, num_with_attention, channels, codes, compose_run):
    from diffusers import AutoencoderKL, VQModel

    config = compose_run(f"experiment=autoencoder/{name}")
    shape = {
        "down_block_types": levels("DownEncoderBlock2D", mults, num_with_attention),
        "up_block_types": levels("UpDecoderBlock2D", mults, num_with_attention)[::-1],
        "block_out_channels": [128 * mult for mult in mults],
        "layers_per_block": 2,
        "latent_channels": channels,
    }
    with torch.device("meta"):
        codec = build_codec(config.model)
        theirs = AutoencoderKL(**shape) if codes is None else VQModel(**shape, num_vq_embeddings=codes)
    ours = count(codec)
    if codes is not None:  # codes are buffers here: moving averages, not gradients, change them
        assert codec.codebook.codes.shape == (codes, channels)
        ours += codec.codebook.codes.numel()
    assert ours == count(theirs)
    if name == "kl_f8":
        assert ours == 83_653_863
    assert codec.downsampling == int(name.split("_")[1].removeprefix("f"))


@pytest.mark.parametrize("name", STEPS)
def test_recipes(name, compose_run):
    config = compose_run(f"experiment={name}")
    steps, batch, gpus = STEPS[name]
    assert config.trainer.devices * config.trainer.num_nodes == gpus
    assert config.trainer.global_batch_size == config.trainer.batch_size * gpus == batch
    assert config.trainer.num_images == steps * batch
    assert config.optimizer.learning_rate == 1e-4
    assert config.optimizer.warmup_images == 10_000 * batch
    assert 0.5 ** (batch / config.ema.half_life_images) == pytest.approx(0.9999, rel=1e-8)
    schedule = config.model.schedule
    assert (schedule.name, schedule.beta_start, schedule.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert config.model.text.max_tokens == 77
    assert not config.model.mask_padding
    lower = CONTINUES[name]
    assert config.init_from == (lower and f"{config.runs_dir}/ldm/{compose_run(f'experiment={lower}').name}")


def test_text_dropout_of_stable_diffusion_1(compose_run):
    shares = {
        n: compose_run(f"experiment={n}").resolution.text_dropout for n in STEPS if n.startswith("sd-v1/")
    }
    assert {name for name, share in shares.items() if share == 0.1} == {"sd-v1/512-v1-3", "sd-v1/512-v1-4"}
    assert set(shares.values()) == {0.0, 0.1}


@cache
def output_shape(network: Any, text_config: TextConfig) -> tuple[int, ...]:
    """Of a denoiser of this configuration on 32 x 32 latents."""
    text = text_network(text_config)
    with torch.device("meta"):
        built = build_denoiser(network, CODEC_CHANNELS, text.token_dim, text.pooled_dim)
        context = torch.empty(2, text_config.max_tokens, text.token_dim)
        return tuple(built(torch.empty(2, CODEC_CHANNELS, 32, 32), torch.empty(2), context).shape)


@pytest.mark.parametrize("text", ["clip", "open_clip", "t5"])
@pytest.mark.parametrize("network", ["unet_sd1", "unet_sd2", "pixart_xl2"])
def test_parts_are_one_override_away(network, text, compose_run):
    """Any denoiser, objective and text encoder, from the experiment of Stable Diffusion 1."""
    for objective in ("eps", "x0", "v", "flow"):
        schedule = ["schedule=flow", "sampling=euler"] if objective == "flow" else []
        overrides = [f"denoiser={network}", f"objective={objective}", f"text={text}", *schedule]
        model = compose_run("experiment=sd-v1/256", *overrides).model
        assert (model.objective.prediction, model.text.name) == (objective, text)
        assert output_shape(model.denoiser, model.text) == (2, CODEC_CHANNELS, 32, 32)
