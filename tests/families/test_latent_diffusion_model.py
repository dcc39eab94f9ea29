"""The loss against the papers' formulas, and what a drawn picture depends on."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from t2i.config import TextConfig
from t2i.diffusion.config import DiffusionSampling, ScheduleConfig
from t2i.errors import ConfigError
from t2i.families.autoencoder.codec import build_codec
from t2i.families.autoencoder.codec_config import KLConfig
from t2i.families.autoencoder.config import AdversarialConfig, PatchBackboneConfig, PerceptualConfig
from t2i.families.autoencoder.config import Config as CodecConfig
from t2i.families.builds_on import BuildsOn
from t2i.families.latent_diffusion.config import (
    Config,
    ObjectiveConfig,
    UNetDenoiserConfig,
)
from t2i.families.latent_diffusion.model import LatentDiffusion
from t2i.families.latent_diffusion.unet import TransformerBlock
from t2i.interfaces import SampleRequest
from t2i.nn import once
from t2i.nn.dit import DiTBlock
from t2i.nn.dit_config import DiTConfig

pytestmark = pytest.mark.usefixtures("float64")

DIT = DiTConfig("dit", width=32, depth=1, heads=2, patch_size=2)
UNET = UNetDenoiserConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=2,
    use_linear_in_transformer=False,
)
SCHEDULES = {
    "flow": ScheduleConfig("flow", shift=1.0),
    "eps": ScheduleConfig("scaled_linear", beta_start=0.00085, beta_end=0.012),
    "v": ScheduleConfig("cosine"),
}
CAPTIONS = ["a red circle", "a blue star on a green background", "a cross"]


def build(name: str, denoiser: DiTConfig | UNetDenoiserConfig = DIT, **changes: object) -> LatentDiffusion:
    """With random weights throughout, so that zero-initialised layers hide nothing."""
    torch.manual_seed(0)
    codec = CodecConfig(
        KLConfig("kl"),
        PatchBackboneConfig("patch", 4, 4, 32, 1),
        PerceptualConfig("none", weight=0.0, weights=None),
        AdversarialConfig(None, weight=0.5, loss="hinge", base_channels=64, num_layers=3, r1_weight=0.0),
    )
    config = Config(
        builds_on=BuildsOn("latest"),
        denoiser=denoiser,
        schedule=SCHEDULES[name],
        objective=ObjectiveConfig(name),
        text=TextConfig("learned", max_tokens=12, width=32, depth=1, heads=2),
        sampling=DiffusionSampling(sampler="euler", steps=4, guidance_scale=2.0),
    )
    model = LatentDiffusion(dataclasses.replace(config, **changes), build_codec(codec)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 4, 8, 8, generator=generator).unbind()


@pytest.mark.parametrize("denoiser", [DIT, UNET], ids=["dit", "unet"])
def test_eps_loss_is_ddpms(denoiser):
    """Algorithm 1 of 2006.11239, x_t by diffusers' scheduler."""
    model, (latent, eps), t = build("eps", denoiser), batch(), torch.tensor([3, 500, 999])
    text = model.text(CAPTIONS)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x_t = scheduler.add_noise(latent, eps, t)
    if denoiser is DIT:
        predicted = model.denoiser(x_t, t.float(), text.tokens, text.pooled, text.mask)
    else:
        predicted = model.denoiser(x_t, t.float(), text.tokens, text.mask)
    expected = (predicted - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(model.loss(latent, text, t, eps), expected, rtol=1e-4, atol=1e-5)


def test_v_loss_is_that_of_progressive_distillation():
    """2202.00512: v = alpha eps - sigma x, by diffusers' scheduler."""
    model, (latent, eps), t = build("v"), batch(), torch.tensor([3, 500, 990])
    text = model.text(CAPTIONS)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    x_t, v = scheduler.add_noise(latent, eps, t), scheduler.get_velocity(latent, eps, t)
    predicted = model.denoiser(x_t, t.float(), text.tokens, text.pooled, text.mask)
    expected = (predicted - v).square().mean((1, 2, 3))
    torch.testing.assert_close(model.loss(latent, text, t, eps), expected, rtol=1e-4, atol=1e-4)


def test_flow_loss_is_flow_matchings():
    """2209.03003, equation 1: the velocity from data to noise along a straight line."""
    model, (latent, eps), t = build("flow"), batch(), torch.tensor([0.25, 0.5, 1.0])
    text = model.text(CAPTIONS)
    scheduler = FlowMatchEulerDiscreteScheduler()
    timestep = 1000 * t
    x_t = torch.cat(
        [scheduler.scale_noise(latent[i : i + 1], timestep[i : i + 1], eps[i : i + 1]) for i in range(len(t))]
    )
    predicted = model.denoiser(x_t, timestep, text.tokens, text.pooled, text.mask)
    expected = (predicted - (eps - latent)).square().mean((1, 2, 3))
    torch.testing.assert_close(model.loss(latent, text, t, eps), expected, rtol=1e-4, atol=1e-5)


def test_min_snr_weighs_each_picture():
    """2303.09556, section 3.4: for eps the weight is min(SNR, gamma) / SNR."""
    (latent, eps), t = batch(), torch.tensor([3, 500, 999])
    plain = build("eps")
    weighted = build("eps", objective=ObjectiveConfig("eps", min_snr_gamma=5.0))
    text = plain.text(CAPTIONS)
    alphas_cumprod = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    ).alphas_cumprod[t]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    assert (snr > 5).any()
    assert (snr < 5).any()
    expected = plain.loss(latent, text, t, eps) * snr.clamp(max=5) / snr
    torch.testing.assert_close(weighted.loss(latent, text, t, eps), expected, rtol=1e-4, atol=1e-6)


def test_mask_padding_hides_padding_from_the_denoiser():
    """With it, what stands in the padding does not matter; without it (Stable Diffusion) it does."""
    for masked in (True, False):
        model, (latent, eps), t = build("eps", mask_padding=masked), batch(), torch.tensor([3, 500, 999])
        text = model.text(CAPTIONS)
        before = model.loss(latent, text, t, eps)
        padding = torch.randn(text.tokens.shape) * ~text.mask[..., None]
        padded = dataclasses.replace(text, tokens=text.tokens + padding)
        assert torch.allclose(model.loss(latent, padded, t, eps), before) is masked


def test_only_the_denoiser_and_a_learned_text_encoder_are_trained():
    model = build("flow").train()
    (latent, eps), t = batch(), torch.tensor([0.1, 0.5, 0.9])
    model.loss(latent, model.text(CAPTIONS), t, eps).mean().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if not name.startswith("codec.")}
    assert not model.codec.training


def draw(
    model: LatentDiffusion,
    prompts: list[str],
    seeds: list[int],
    scale: float = 3.0,
    sampler: str = "ddim",
    size_px: tuple[int, int] = (32, 32),
    negative_prompt: str = "",
) -> torch.Tensor:
    request = SampleRequest(prompts, seeds, *size_px, negative_prompt)
    return model.generate(request, DiffusionSampling(sampler=sampler, steps=3, guidance_scale=scale))


@pytest.mark.parametrize(
    ("objective", "denoiser", "sampler"),
    [("flow", DIT, "euler"), ("eps", UNET, "ddim"), ("v", DIT, "dpmpp_2m")],
    ids=["dit-flow", "unet-eps", "dit-v"],
)
def test_a_picture_is_the_same_in_every_batch(objective, denoiser, sampler):
    model = build(objective, denoiser)
    together = draw(model, CAPTIONS, [5, 6, 5], sampler=sampler)
    assert together.shape == (3, 3, 32, 32)
    assert together.abs().max() <= 1
    for i, seed in enumerate([5, 6, 5]):
        alone = draw(model, CAPTIONS[i : i + 1], [seed], sampler=sampler)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)
    assert (together[0] - together[1]).abs().max() > 0.1  # not all saturated


@pytest.mark.parametrize("denoiser", [UNET, DIT], ids=["unet", "dit"])
def test_the_text_is_read_once_for_all_steps(denoiser, monkeypatch):
    """Three steps give the bits that they give where each reads it anew."""
    model, reads = build("eps", denoiser), []
    cross = [
        each.attn2 if isinstance(each, TransformerBlock) else each.cross_attention
        for each in model.denoiser.modules()
        if isinstance(each, TransformerBlock | DiTBlock)
    ]
    for attention in cross:
        attention.to_k.register_forward_hook(lambda *_: reads.append(1))
    read_once = draw(model, CAPTIONS, [5, 6, 5])
    assert len(reads) == len(cross) > 0
    unset = SimpleNamespace(get=lambda: None, set=lambda _: None, reset=lambda _: None)
    monkeypatch.setattr(once, "_last", unset)
    assert torch.equal(draw(model, CAPTIONS, [5, 6, 5]), read_once)
    assert len(reads) == (1 + 3) * len(cross)


def test_prompt_and_seed_and_guidance_and_negative_prompt_matter():
    model = build("flow")
    first = draw(model, CAPTIONS[:1], [5], sampler="euler")
    other = [
        draw(model, CAPTIONS[1:2], [5], sampler="euler"),
        draw(model, CAPTIONS[:1], [6], sampler="euler"),
        draw(model, CAPTIONS[:1], [5], scale=1.0, sampler="euler"),
        draw(model, CAPTIONS[:1], [5], sampler="euler", negative_prompt="green"),
    ]
    for changed in other:
        assert (changed - first).abs().max() > 1e-3


def test_guidance_of_one_is_the_unguided_model():
    """It takes the path with one call per picture; 1 + 1e-6 takes the guided one, which ends there too. The
    negative prompt plays no part."""
    model, sizes = build("flow"), []
    model.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    plain = draw(model, CAPTIONS, [5, 6, 7], scale=1.0, sampler="euler")
    assert sizes == [3, 3, 3]
    sizes.clear()
    guided = draw(model, CAPTIONS, [5, 6, 7], scale=1.0 + 1e-6, sampler="euler")
    assert sizes == [6, 6, 6]
    torch.testing.assert_close(guided, plain, rtol=0, atol=1e-4)
    negative = draw(model, CAPTIONS, [5, 6, 7], scale=1.0, sampler="euler", negative_prompt="green")
    assert torch.equal(negative, plain)


def test_guidance_of_zero_ignores_the_prompt():
    model = build("flow")
    images = draw(model, CAPTIONS, [5, 5, 5], scale=0.0, sampler="euler")
    torch.testing.assert_close(images, images[:1].expand_as(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize("denoiser", [DIT, UNET], ids=["dit", "unet"])
def test_sizes_that_do_not_divide_are_refused(denoiser):
    """8 px: the codec's 4 times 2 for the patches of the DiT, and for the UNet's lower level."""
    model = build("eps", denoiser)
    for size, key in (((36, 32), "height"), ((32, 4), "width"), ((0, 32), "height")):
        with pytest.raises(
            ConfigError, match=f"{key} is {min(size) if key == 'width' else size[0]}; allowed: multiples of 8"
        ):
            draw(model, CAPTIONS[:1], [0], size_px=size)
    assert draw(model, CAPTIONS[:1], [0], size_px=(24, 40)).shape == (1, 3, 24, 40)


def test_a_frozen_text_encoder_stays_out_of_the_weights(monkeypatch):
    class Frozen(nn.Linear):
        trainable, token_dim, pooled_dim, max_tokens = False, 8, 8, 4

    monkeypatch.setattr(
        "t2i.text.build_text_encoder",
        lambda config: Frozen(2, 2).requires_grad_(False),
    )
    assert not any(name.startswith("text") for name in build("flow").state_dict())


def tile_request(noise: torch.Tensor, **changes: object) -> SampleRequest:
    return SampleRequest(CAPTIONS[:2], [0, 1], 32, 32, noise=noise, **changes)


@pytest.mark.parametrize("tile", ["x", "y", "xy"])
def test_a_tiling_picture_of_moved_noise_is_the_moved_picture(tile):
    model, noise = build("eps", UNET), batch()[1][:2]
    shift = [4 * (axis in tile) for axis in "yx"]
    pixels = [4 * each for each in shift]
    sampling = dataclasses.replace(model.config.sampling, sampler="ddim")
    first = model.generate(tile_request(noise, tile=tile), sampling)
    moved = model.generate(tile_request(noise.roll(shift, (2, 3)), tile=tile), sampling)
    torch.testing.assert_close(moved, first.roll(pixels, (2, 3)), rtol=0, atol=1e-10)
    assert not torch.allclose(model.generate(tile_request(noise), sampling), first, atol=1e-3)
    with pytest.raises(ConfigError, match="tile is 'x'; allowed: none with this model"):
        build("eps").generate(tile_request(noise, tile="x"), sampling)


def test_a_picture_and_its_noise():
    """Without a codec's loss: the latent that the noise leads back to is that of the picture."""
    model = build("eps", UNET)
    with torch.no_grad():
        model.denoiser.out[2].weight *= 0.05  # smooth, as what was trained is
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = SampleRequest(CAPTIONS[:2], [0, 1], 32, 32, image=image)
    expected = model.codec.decode(model.codec.encode(image)).clamp(-1, 1)
    errors = []
    for steps in (10, 80):
        sampling = dataclasses.replace(model.config.sampling, sampler="ddim", steps=steps, guidance_scale=1.0)
        noise = model.invert(asked, sampling)
        assert noise.shape == (2, 4, 8, 8)
        errors.append((model.generate(tile_request(noise), sampling) - expected).abs().mean().item())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("at_a_time", [1, 2, 3])
def test_latents_are_decoded_a_few_at_a_time(monkeypatch, at_a_time):
    from t2i.families import codec as codecs

    codec = build("flow").codec
    latents = torch.randn(3, codec.latent_channels, 4, 6, generator=torch.Generator().manual_seed(0))
    seen, decode = [], codec.decode
    monkeypatch.setattr(codec, "decode", lambda part: seen.append(len(part)) or decode(part))
    monkeypatch.setattr(codecs, "CPU_SLICE_PX", at_a_time * 16 * 24 + 1)
    torch.testing.assert_close(codecs.decoded(codec, latents), decode(latents), rtol=1e-12, atol=1e-12)
    assert seen == {1: [1, 1, 1], 2: [2, 1], 3: [3]}[at_a_time]
