"""trained=upsampler: pictures of twice the size from the codes that there are."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from codec_parts import (
    LARGER,
    TINY,
    VQ,
    checkpoint_of,
    first_run,
    images,
    saved_codec,
    saved_masked_model,
    steps,
)

from t2i.config import run_to_dict
from t2i.errors import ConfigError
from t2i.families.autoencoder.config import UpsamplerConfig
from t2i.families.autoencoder.stage import Stage
from t2i.families.autoencoder.upsampler import Upsampler
from t2i.families.codec_run import newest_codec
from t2i.families.tokens import coding_hash
from t2i.interfaces import SampleRequest
from t2i.nn.resize import smaller
from t2i.training.run_folder import FINAL_WEIGHTS, write_config
from t2i_cli.generators import load as load_to_draw

CODECS = {"vq": VQ, "kl": ("codec=kl",)}


@pytest.mark.parametrize("factor", [2, 4])
def test_it_starts_as_bicubic_enlargement(factor):
    upsampler = Upsampler(UpsamplerConfig(factor, channels=4, blocks=1)).double()
    x = torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, inner = F.interpolate(x, scale_factor=factor, mode="bicubic"), slice(2 * factor, -2 * factor)
    found = upsampler(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found[..., inner, inner], expected[..., inner, inner], rtol=0, atol=1e-6)


def test_the_published_size():
    """Parti: about 15 million parameters."""
    with torch.device("meta"):
        upsampler = Upsampler(UpsamplerConfig(factor=2))
    assert round(sum(p.numel() for p in upsampler.parameters()) / 1e6) in (14, 15)


@pytest.mark.parametrize("codec", CODECS)
def test_the_upsampler_alone_learns(codec, compose_run):
    start = first_run(compose_run, *CODECS[codec])
    before = Stage(compose_run(*TINY, *CODECS[codec]), start).codec.eval()
    stage = Stage(compose_run(*TINY, *LARGER, *CODECS[codec]), start)
    assert stage.codec.downsampling == 2 * before.downsampling
    assert not any(module.training for part in stage.codec.frozen() for module in part.modules())
    losses = steps(stage, 8)
    assert losses[-1] < losses[0], losses
    for name, value in stage.codec.state_dict().items():
        if not name.startswith("upsampler."):
            assert torch.equal(value, start.weights[f"codec.{name}"]), name
    assert all(name.startswith("codec.upsampler.") for name in stage.averages())
    assert coding_hash(stage.codec) == coding_hash(before)
    large, small = images(64), smaller(images(64), (32, 32))
    torch.testing.assert_close(stage.codec.eval().moments(large), before.moments(small))
    found, expected = (
        codec.reconstruct(each).image for codec, each in ((stage.codec, large), (before, small))
    )
    assert found.shape == (4, 3, 64, 64)
    torch.testing.assert_close(found, stage.codec.upsampler(expected))


def test_a_run_of_it_goes_on(compose_run):
    stage = Stage(compose_run(*TINY, *LARGER, *VQ), first_run(compose_run, *VQ))
    steps(stage, 3)
    again = checkpoint_of(stage, "second")
    on = Stage(compose_run(*TINY, *LARGER, *VQ), again)
    assert all(torch.equal(value, again.weights[name]) for name, value in on.state_dict().items())


def test_what_was_trained_on_the_codes_draws_larger(compose_run, tmp_path):
    start = first_run(compose_run, *VQ)
    stage = Stage(compose_run(*TINY, *LARGER, *VQ), start)
    steps(stage, 3)
    place = saved_codec(stage, tmp_path / "larger.safetensors")
    saved_masked_model(compose_run, start, tmp_path / "masked")
    codes, drawn = [], []
    for typed, size in (([], 32), ([f"builds_on.codec={place}"], 64)):
        generator = load_to_draw(tmp_path / "masked", torch.device("cpu"), typed).generator
        own = generator.model.drawn_codes
        generator.model.drawn_codes = lambda *given, own=own: (codes.append(own(*given)), codes[-1])[1]
        assert generator.default_size_px == size
        drawn.append(generator.generate(SampleRequest.of_size(["a red circle"], size)))
    assert torch.equal(codes[0][0], codes[1][0])
    expected = stage.codec.eval().decode_tokens(codes[0][0]).clamp(-1, 1)
    torch.testing.assert_close(drawn[1], expected)


def test_the_newest_codec_is_one_without(compose_run, tmp_path):
    """Of latents, too, one that has some."""
    newer = {"codec": VQ, "larger": (*VQ, *LARGER), "logits": ("codec=gumbel",)}
    for number, (name, typed) in enumerate(newer.items()):
        folder = tmp_path / "autoencoder" / name
        folder.mkdir(parents=True)
        write_config(folder, run_to_dict(compose_run(*TINY, *typed)))
        (folder / FINAL_WEIGHTS).touch()
        os.utime(folder / FINAL_WEIGHTS, (number, number))
    for part, name in (("codec", "codec"), ("token_codec", "logits")):
        assert newest_codec(str(tmp_path), part) == (tmp_path / "autoencoder" / name, [])


def test_what_does_not_fit_is_said(compose_run, capsys):
    for typed, words in {
        ("trained=upsampler",): "upsampler.factor is 1; allowed: 2 or 4 with trained=upsampler",
        ("upsampler.factor=2",): "upsampler.factor is 2; allowed: 1 with trained=all",
        ("trained=upsampler", "upsampler.factor=3"): "upsampler.factor is 3; allowed: 1, 2 or 4",
        (
            "trained=upsampler",
            "upsampler.factor=2",
            "upsampler.blocks=0",
        ): "upsampler.blocks is 0; allowed: 1 or",
        (
            "trained=upsampler",
            "upsampler.factor=2",
            "backbone=dvae",
            "codec=gumbel",
        ): "trained is 'upsampler'",
    }.items():
        with pytest.raises(ConfigError, match=words):
            compose_run("stage=autoencoder", *typed)
    with pytest.raises(ConfigError, match="trained is 'upsampler'; allowed: all without init_from=RUN"):
        Stage(compose_run(*TINY, *LARGER, *VQ))
    with pytest.raises(ConfigError, match=r"resolution.size_px is 36; allowed: multiples of 8, the codec's"):
        Stage(compose_run(*TINY, *LARGER, "resolution.size_px=36"), first_run(compose_run))


@pytest.mark.parametrize("trained", ["all", "decoder"])
def test_nothing_else_goes_on_from_a_run_of_it(trained, compose_run):
    start = checkpoint_of(Stage(compose_run(*TINY, *LARGER, *VQ), first_run(compose_run, *VQ)), "second")
    words = f"trained is '{trained}'; allowed: upsampler with init_from=second"
    with pytest.raises(ConfigError, match=words):
        Stage(compose_run(*TINY, *VQ, f"trained={trained}"), start)
