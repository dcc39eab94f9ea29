"""Pictures as tokens: what the quantiser says, there and back."""

from __future__ import annotations

import pytest
import torch

from t2i.config import run_to_dict
from t2i.errors import ConfigError
from t2i.families.autoencoder.codec import DiscreteCodec
from t2i.families.autoencoder.stage import Stage
from t2i.families.codec import image_codec, latent_codec, token_codec
from t2i.families.latent_diffusion.model import build_model
from t2i.families.latent_diffusion.plan import planned_networks
from t2i.interfaces import Batch, TokenCodec

PATCH, CONVOLUTIONS = [], ["backbone=ldm_small", "backbone.base_channels=8", "backbone.channel_mult=[1,2]"]


@pytest.fixture(params=[PATCH, CONVOLUTIONS], ids=["patch", "convolutions"])
def values(request, compose_run):
    return run_to_dict(compose_run("experiment=autoencoder/tiny_vq", *request.param))


@pytest.fixture
def codec(values, float64) -> DiscreteCodec:
    torch.manual_seed(0)
    made = token_codec(values, "a run")
    assert isinstance(made, DiscreteCodec)
    made = made.double()
    made.codebook.codes.copy_(made.moments(pictures(7)).movedim(1, -1).flatten(0, 2)[: made.num_codes])
    made.codebook.codes.mul_(0.9)
    made.latent_scale.fill_(0.7)
    return made


def pictures(seed: int = 1) -> torch.Tensor:
    return (
        2 * torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    )


def test_tokens_are_the_nearest_codes_and_learn_nothing(codec):
    image, before = pictures(), {name: value.clone() for name, value in codec.state_dict().items()}
    tokens = codec.train().tokens(image)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, *codec.latent_shape(32, 64)[1:])
    vectors = codec.moments(image).movedim(1, -1)
    distance = (vectors[..., None, :] - codec.codebook.codes).square().sum(-1)
    assert torch.equal(tokens, distance.argmin(-1))
    assert len(tokens.unique()) > 2
    assert 0 <= tokens.min() <= tokens.max() < codec.num_codes == len(codec.codebook.codes)
    assert all(torch.equal(before[name], value) for name, value in codec.state_dict().items())
    assert torch.equal(tokens, codec.eval().codebook(codec.moments(image)).indices)


def test_a_picture_goes_through_tokens_as_it_goes_through_latents(codec):
    image = pictures()
    with torch.no_grad():
        there, expected = codec.eval().decode_tokens(codec.tokens(image)), codec.decode(codec.encode(image))
    assert there.shape == image.shape
    torch.testing.assert_close(there, expected, rtol=1e-9, atol=1e-9)


def test_codes_are_their_own_tokens(codec):
    tokens = torch.arange(codec.num_codes).view(1, 1, -1)
    assert torch.equal(codec.codebook.indices(codec.codebook.lookup(tokens)), tokens)


def test_autocast_does_not_change_the_tokens(codec):
    z = codec.moments(pictures()).float().detach()
    codec.codebook.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = codec.codebook.indices(z)
    assert torch.equal(cast, codec.codebook.indices(z))


def test_a_run_without_tokens_is_refused_where_they_are_needed(compose_run):
    kl = run_to_dict(compose_run("experiment=autoencoder/tiny_kl"))
    said = "builds_on.codec is 'runs/kl', whose KLCodec gives no tokens; allowed: a run whose codec has a codebook."
    with pytest.raises(ConfigError) as refused:
        token_codec(kl, "runs/kl")
    assert str(refused.value) == said
    assert image_codec(kl).latent_channels == kl["backbone"]["latent_channels"]


def test_logits_of_codes_are_refused_where_latents_are_needed(compose_run):
    """Adding the same number to all logits changes nothing, so that they have no scale."""
    run = run_to_dict(compose_run("stage=autoencoder", "codec=gumbel"))
    with pytest.raises(ConfigError) as refused:
        latent_codec(run, "runs/gumbel")
    assert str(refused.value) == (
        "builds_on.codec is 'runs/gumbel', whose encoder gives logits of codes and no latents; allowed: a run with "
        "codec=kl, vq, lfq or fsq."
    )
    ldm = compose_run("experiment=latent_diffusion/tiny_dit_flow")
    with pytest.raises(ConfigError, match="is 'latest', whose encoder gives logits"):
        planned_networks(ldm, {"codec": run})
    with pytest.raises(ConfigError, match="is 'latest', whose encoder gives logits"):
        build_model(ldm.model, run)
    for codec in ("kl", "vq", "lfq", "fsq"):
        run = run_to_dict(compose_run("stage=autoencoder", f"codec={codec}"))
        assert latent_codec(run, "runs/other").has_latents


@pytest.mark.parametrize("channels", [3, 8])
def test_codes_of_scalars_go_there_and_back(channels, compose_run, float64):
    """Of as many channels as the backbone has, and of fewer."""
    torch.manual_seed(0)
    config = compose_run("experiment=autoencoder/tiny_fsq", f"backbone.latent_channels={channels}")
    codec = token_codec(run_to_dict(config), "a run").double()
    image = pictures()
    with torch.no_grad():
        tokens = codec.tokens(image)
        there, expected = codec.decode_tokens(tokens), codec.decode(codec.encode(image))
    assert len(tokens.unique()) > 2
    assert 0 <= tokens.min() <= tokens.max() < codec.num_codes == 75
    torch.testing.assert_close(there, expected, rtol=1e-9, atol=1e-9)


FSQ, VQ, LFQ, GUMBEL = (f"codec={name}" for name in ("fsq", "vq", "lfq", "gumbel"))


@pytest.mark.parametrize(
    ("codec", "argument", "said"),
    [
        (FSQ, "codec.levels=[5,2]", "codec.levels is [5, 2]; allowed: one or more numbers from 3 on"),
        (FSQ, "codec.levels=[]", "codec.levels is []; allowed: one or more numbers from 3 on"),
        (FSQ, "codec.levels=[64,64,64,64]", "allowed: levels whose product is at most 1,048,576."),
        (VQ, "codec.code_dim=17", "codec.code_dim is 17; allowed: 1 to 16, backbone.latent_channels."),
        (VQ, "codec.code_dim=0", "codec.code_dim is 0; allowed: 1 or more, or null."),
        (
            LFQ,
            "codec.num_codes=1000",
            "codec.num_codes is 1000; allowed: a power of two from 2 to 1,048,576.",
        ),
        (LFQ, "codec.entropy_temperature=0", "codec.entropy_temperature is 0.0; allowed: above 0."),
        (GUMBEL, "codec.num_codes=1", "codec.num_codes is 1; allowed: 2 to 1,048,576."),
        (GUMBEL, "codec.start_temperature=0.01", "allowed: codec.end_temperature (0.0625) or more."),
        (GUMBEL, "codec.kl_weight=-1", "codec.kl_weight is -1.0; allowed: 0 or more."),
    ],
)
def test_a_quantiser_that_cannot_be_is_refused(codec, argument, said, compose_run):
    with pytest.raises(ConfigError) as refused:
        compose_run("stage=autoencoder", codec, argument)
    assert said in str(refused.value)


KINDS = {
    "vq by cosine": ["codec=vq", "codec.num_codes=32", "codec.code_dim=3", "codec.normalize=true"],
    "lfq": ["codec=lfq", "codec.num_codes=32"],
    "gumbel": ["codec=gumbel", "codec.num_codes=32"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_quantiser_trains(kind, compose_run, float64):
    """One step: finite, what is drawn depends on the sample alone, and every parameter learns."""
    torch.manual_seed(0)
    small = ["backbone.latent_channels=8", "backbone.width=32", "backbone.depth=1", "trainer.num_images=100"]
    common = ["stage=autoencoder", "data=shapes", 'resolution="32"', "perceptual=none", "adversarial=none"]
    stage = Stage(compose_run(*common, *KINDS[kind], *small)).double()
    codec, image = stage.codec, pictures()[..., :32]
    assert isinstance(codec, TokenCodec)
    for parameter in codec.parameters():  # what starts at zero keeps what is before it from learning
        if parameter.eq(0).all():
            torch.nn.init.normal_(parameter, std=0.02)
    stage.images_seen = 50
    losses = step_losses(stage, image, [3, 4])
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert {"codebook_usage", "codebook_perplexity"} <= losses.keys()
    assert 1 <= losses["codebook_perplexity"] <= codec.num_codes == 32
    assert [name for name, p in codec.named_parameters() if p.grad is None or p.grad.eq(0).all()] == []
    if kind == "gumbel":
        torch.testing.assert_close(losses["temperature"], torch.tensor(17 / 32))
        twice = [step_losses(stage, image, position)["l1"] for position in ([3, 4], [5, 6])]
        assert twice[0] == losses["l1"] != twice[1]
    codec.eval()
    with torch.no_grad():
        tokens = codec.tokens(image)
        assert tokens.shape == (2, 8, 8)
        torch.testing.assert_close(codec.decode_tokens(tokens), codec.reconstruct(image).image)
        torch.testing.assert_close(codec.decode_tokens(tokens), codec.decode(codec.encode(image)))


def test_half_of_the_pictures_are_turned_upside_down(compose_run, float64):
    """Which ones depends on the sample alone, and to the codec they are the pictures."""
    image = pictures().repeat(8, 1, 1, 1)[..., :32]
    plain, turns = (
        Stage(compose_run("experiment=autoencoder/tiny_fsq", f"vertical_flip={value}")).double()
        for value in ("false", "true")
    )
    turns.load_state_dict(plain.state_dict())
    position = list(range(40, 56))
    turned = turns.randomness(batch_of(image, position)).uniform("vertical flip") < 0.5
    assert 3 <= turned.sum() <= 13
    expected = torch.stack([one.flip(1) if flip else one for one, flip in zip(image, turned, strict=True)])
    with torch.no_grad():
        found, same = step_losses(turns, image, position), step_losses(plain, expected, position)
    torch.testing.assert_close(found, same)
    assert found["l1"] != step_losses(plain, image, position)["l1"]


def batch_of(image: torch.Tensor, position: list[int]) -> Batch:
    row, names = torch.zeros(len(image), 2, dtype=torch.int64), ["x"] * len(image)
    return Batch(image, names, names, row, row, [{}] * len(image), torch.tensor(position))


def step_losses(stage: Stage, image: torch.Tensor, position: list[int]) -> dict[str, torch.Tensor]:
    batch = batch_of(image, position)
    return stage.losses("codec", batch, stage.randomness(batch))
