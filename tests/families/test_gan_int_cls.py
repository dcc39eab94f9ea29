"""GAN-INT-CLS: the published losses, the textbook's two turns, what it draws and what it refuses."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from t2i.config import parse_run, run_to_dict
from t2i.errors import ConfigError
from t2i.families.gan_int_cls.config import Config
from t2i.families.gan_int_cls.losses import (
    generator_loss,
    interpolated_captions,
    matching_aware_loss,
    wrong_pairs,
)
from t2i.families.gan_int_cls.model import GanIntCls
from t2i.families.gan_int_cls.stage import Stage
from t2i.interfaces import Batch, Between, SampleRequest, TextFeatures
from t2i.training.optimizer import learning_rate
from t2i.training.randomness import Randomness
from t2i.training.step import train_step

TINY = ["experiment=gan_int_cls/tiny_r1", "experiment=gan_int_cls/tiny_published"]
CAPTIONS = ["a red circle", "a blue star", "a green square", "a red star"]
POOLED = 24


class WordCounts(nn.Module):
    """A frozen text encoder without weights to read."""

    trainable = False
    token_dim = pooled_dim = POOLED
    max_tokens = 8

    def forward(self, captions):
        rows = [
            torch.tensor([math.sin((i + 1) * sum(caption.encode())) for i in range(POOLED)])
            for caption in captions
        ]
        pooled = torch.stack(rows).to(torch.get_default_dtype())
        return TextFeatures(pooled[:, None], pooled, torch.ones(len(captions), 1, dtype=torch.bool))


@pytest.fixture(autouse=True)
def _text(monkeypatch):
    monkeypatch.setattr("t2i.text.build_text_encoder", lambda config: WordCounts())
    torch.manual_seed(0)


def batch_of(captions=CAPTIONS, size_px=32) -> Batch:
    count = len(captions)
    return Batch(
        image=torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(1)) * 2 - 1,
        caption=list(captions),
        key=[str(i) for i in range(count)],
        original_size=torch.full((count, 2), size_px),
        crop=torch.zeros(count, 2, dtype=torch.int64),
        metadata=[{}] * count,
        position=torch.arange(count),
    )


@pytest.mark.usefixtures("float64")
def test_matching_aware_loss_is_that_of_three_cross_entropies():
    real, wrong, fake = torch.randn(5), torch.randn(4), torch.randn(5)
    ones, zeros, bce = torch.ones(5), torch.zeros(5), F.binary_cross_entropy
    parts = bce(real.sigmoid(), ones), bce(wrong.sigmoid(), zeros[:4]), bce(fake.sigmoid(), zeros)
    expected = parts[0] + 0.5 * parts[1] + 0.5 * parts[2]
    torch.testing.assert_close(matching_aware_loss(real, wrong, fake, 0.5), expected)
    plain = bce(real.sigmoid(), ones) + bce(fake.sigmoid(), zeros)
    torch.testing.assert_close(matching_aware_loss(real, wrong, fake, 0.0), plain)
    torch.testing.assert_close(matching_aware_loss(real, wrong[:0], fake, 0.0), plain)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_generator_loss_is_the_published_weighted_cross_entropy(weight):
    """`nn.BCECriterion(weights)` over batch * 3 / 2 pictures, the interpolated ones last."""
    fake, interpolated = torch.randn(6), torch.randn(3)
    weights = torch.cat([torch.ones(6), torch.full((3,), weight)])
    every = torch.cat([fake, interpolated]).sigmoid()
    expected = F.binary_cross_entropy(every, torch.ones(9), weight=weights)
    torch.testing.assert_close(generator_loss(fake, interpolated, weight), expected)


def test_captions_between_two_are_of_the_first_half_and_the_second():
    pooled = torch.tensor([[0.0], [2.0], [10.0], [20.0], [99.0]])
    assert interpolated_captions(pooled).flatten().tolist() == [5.0, 11.0]
    assert interpolated_captions(pooled[:1]).shape == (0, 1)


def test_a_wrong_caption_is_never_the_pictures_own():
    assert wrong_pairs(["a", "b", "c"]) == ([0, 1, 2], [2, 0, 1])
    assert wrong_pairs(["a", "a", "b", "a"]) == ([2, 3], [1, 2])
    assert wrong_pairs(["a", "a"]) == ([], [])
    assert wrong_pairs(["a"]) == ([], [])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("experiment", TINY)
def test_one_step_is_the_textbooks_two(experiment, compose_run):
    """Adam on the discriminator's loss with the generator's pictures as constants; then Adam on the generator's loss
    through the new discriminator, which stays as it is. (Running statistics of the discriminator's convolutions, which
    nothing reads, see real pictures once, not twice.)"""
    config = compose_run(
        experiment, "trainer.batch_size=4", "optimizer.warmup_images=0", "trainer.precision=64-true"
    )
    stage = Stage(config).double()
    stage.__dict__["_device"] = torch.device("cpu")
    plain, batch, model = copy.deepcopy(stage.model), batch_of(), config.model
    optimizers = stage.configure_optimizers()

    class Alone:
        world_size = 1

    stage._trainer = Alone()
    metrics = train_step(stage, stage.turns(), optimizers, batch, torch.Tensor.backward, None)
    assert {"discriminator", "generator", "logit_real", "logit_wrong", "logit_fake"} <= metrics.keys()
    assert all(p.requires_grad for p in stage.model.parameters())

    generator, discriminator, bce = plain.generator, plain.discriminator, F.binary_cross_entropy_with_logits
    random = Randomness(config.seed, batch.position, torch.float64)
    text, dim = WordCounts()(CAPTIONS).pooled, model.generator.noise_dim
    settings = {"lr": config.optimizer.learning_rate, "betas": config.optimizer.betas}
    ones, zeros = torch.ones(4), torch.zeros(4)

    real_image = batch.image.detach().clone().requires_grad_()
    fake_image = generator(random.normal("noise of the discriminator", dim), text).detach()
    real, fake = discriminator(real_image, text), discriminator(fake_image, text)
    wrong = discriminator(batch.image.detach(), text.roll(1, 0))
    loss = bce(real, ones) + 0.5 * bce(wrong, zeros) + 0.5 * bce(fake, zeros)
    torch.testing.assert_close(metrics["logit_wrong"], wrong.mean().detach())
    if model.r1_weight:
        (slope,) = torch.autograd.grad(real.sum(), real_image, create_graph=True)
        loss = loss + 0.5 * model.r1_weight * model.r1_every * slope.square().sum() / 4
    torch.testing.assert_close(metrics["discriminator"], loss.detach())
    adam = torch.optim.Adam(discriminator.parameters(), **settings)
    loss.backward()
    adam.step()

    noise = torch.cat(
        [random.normal(f"noise of the {name}", dim) for name in ("generator", "interpolated captions")]
    )[:6]
    text = torch.cat([text, (text[:2] + text[2:]) / 2])
    loss = bce(discriminator(generator(noise, text), text), torch.ones(6))
    torch.testing.assert_close(metrics["generator"], loss.detach())
    adam = torch.optim.Adam(generator.parameters(), **settings)
    adam.zero_grad()
    loss.backward()
    adam.step()
    for name, value in plain.state_dict().items():
        if not name.startswith("discriminator.layers.") or name in dict(plain.named_parameters()):
            torch.testing.assert_close(stage.model.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("turn", ["discriminator", "generator"])
def test_a_turn_gives_gradients_to_its_own_network_alone(turn, compose_run):
    from t2i.training.step import only_trained

    stage, batch = Stage(compose_run(TINY[0], "trainer.batch_size=4")), batch_of()
    turns = {each.name: each for each in stage.turns()}
    with only_trained(turns[turn], list(turns.values())):
        stage.losses(turn, batch, Randomness(0, batch.position, torch.float32))["loss"].backward()
    own, other = (stage.model.discriminator, stage.model.generator)[:: 1 if turn == "discriminator" else -1]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())
    assert all(p.grad is None for p in other.parameters())


def asked(stage, turn):
    """How many captions the discriminator judges in a turn, call by call; the losses; how many pictures it sees."""
    judged, seen, batch = [], [], batch_of()
    discriminator = stage.model.discriminator
    hooks = [
        module.register_forward_pre_hook(lambda module, given, counts=counts: counts.append(len(given[0])))
        for module, counts in ((discriminator.text, judged), (discriminator.layers[0], seen))
    ]
    losses = stage.losses(turn, batch, Randomness(0, batch.position, torch.float32))
    for hook in hooks:
        hook.remove()
    return judged, losses, seen


def test_interpolation_and_matching_can_be_turned_off(compose_run):
    on = Stage(compose_run(TINY[0]))
    assert asked(on, "generator")[0] == [6]
    judged, _, seen = asked(on, "discriminator")
    assert judged == [4, 4, 4]
    assert seen == [4, 4]  # real pictures once, for their own captions and the wrong ones
    off = Stage(compose_run(TINY[0], "interpolation_weight=0", "wrong_weight=0"))
    assert asked(off, "generator")[0] == [4]
    judged, losses, _ = asked(off, "discriminator")
    assert judged == [4, 4]
    assert "logit_wrong" not in losses


def test_the_penalty_is_computed_every_so_many_steps(compose_run):
    stage = Stage(compose_run(TINY[0], "r1_every=3"))
    found = []
    for stage.steps_done in range(6):
        found.append("r1" in asked(stage, "discriminator")[1])
    assert found == [True, False, False, True, False, False]
    assert "r1" not in asked(Stage(compose_run(TINY[0], "r1_weight=0")), "discriminator")[1]


def test_a_batch_of_one_caption_has_no_wrong_pairs(compose_run):
    stage, batch = Stage(compose_run(TINY[0])), batch_of(["a red circle"] * 4)
    losses = stage.losses("discriminator", batch, Randomness(0, batch.position, torch.float32))
    assert "logit_wrong" not in losses
    assert losses["loss"].isfinite()


def test_both_turns_follow_the_halved_rate(compose_run):
    stage = Stage(compose_run(TINY[1]))
    assert [turn.name for turn in stage.turns()] == ["discriminator", "generator"]
    for images, rate in ((0, 1e-3), (31, 1e-3), (32, 5e-4), (64, 2.5e-4)):
        assert {learning_rate(turn.optimizer, images, 64) for turn in stage.turns()} == {rate}


def test_what_older_runs_say_of_the_halving_is_read(compose_run):
    config = compose_run(TINY[1])
    older = run_to_dict(config) | {"halve_every_images": 32}
    older["optimizer"] = older["optimizer"] | {"schedule": "constant"}
    del older["optimizer"]["halve_every_images"]
    assert parse_run(older, Config) == config
    never = older | {"halve_every_images": None}
    assert parse_run(never, Config).optimizer.schedule == "constant"
    older["optimizer"]["schedule"] = "cosine"
    with pytest.raises(ConfigError, match="halve_every_images is 32; allowed: null with"):
        parse_run(older, Config)


def test_the_average_is_of_the_generator(compose_run):
    averages = Stage(compose_run(TINY[0])).averages()
    assert averages
    assert all(name.startswith("model.generator.") for name in averages)


def request(prompts=("a red circle",), **changes) -> SampleRequest:
    made = SampleRequest(prompts=list(prompts), seeds=range(len(prompts)), height_px=32, width_px=32)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def model(compose_run):
    config = compose_run(TINY[0]).model
    return GanIntCls(config, 32).to(torch.get_default_dtype()).eval(), config.sampling


@pytest.mark.usefixtures("float64")
def test_a_picture_depends_on_its_prompt_and_seed_alone(model):
    network, sampling = model
    images = network.generate(request(CAPTIONS), sampling)
    assert images.shape == (4, 3, 32, 32)
    assert images.abs().max() <= 1
    alone = network.generate(request(CAPTIONS[2:3], seeds=[2]), sampling)
    torch.testing.assert_close(images[2:3], alone)
    assert not torch.equal(network.generate(request(CAPTIONS[2:3], seeds=[3]), sampling), alone)
    assert not torch.equal(network.generate(request(CAPTIONS[1:2], seeds=[2]), sampling), alone)
    still = dataclasses.replace(sampling, noise_scale=0.0)
    assert torch.equal(*(network.generate(request(seeds=[seed]), still) for seed in (0, 1)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width_px": 48}, "width is 48; allowed: 32, the size"),
        ({"height_px": 64}, "height is 64; allowed: 32, the size"),
        ({"negative_prompt": "blurry"}, "negative_prompt is 'blurry'; allowed: none"),
        ({"image": torch.zeros(1, 3, 32, 32)}, "image is 'a picture to start from'; allowed: none"),
        ({"tile": "x"}, "tile is 'x'; allowed: none"),
    ],
)
def test_what_this_family_cannot_draw_is_refused(model, changes, sentence):
    network, sampling = model
    with pytest.raises(ConfigError, match=sentence):
        network.generate(request(**changes), sampling)


def test_a_picture_has_no_noise_to_be_told(model):
    network, sampling = model
    with pytest.raises(ConfigError, match="image is 'a picture to invert'; allowed: none"):
        network.invert(request(image=torch.zeros(1, 3, 32, 32)), sampling)


@pytest.mark.usefixtures("float64")
def test_pictures_between_two_begin_and_end_on_them(model):
    network, sampling = model
    ends = network.generate(request(CAPTIONS[:2]), sampling)
    between = Between([0.0, 0.5, 1.0], CAPTIONS[1:2] * 3, [1] * 3)
    strip = network.generate(request(CAPTIONS[:1] * 3, seeds=[0] * 3, between=between), sampling)
    torch.testing.assert_close(strip[[0, 2]], ends)
    assert min((strip[1] - end).abs().max() for end in ends) > 1e-5


def test_numbers_that_are_not_finite_are_nan_pictures(model):
    network, sampling = model
    nn.init.constant_(network.generator.layers[0].weight, math.inf)
    assert network.generate(request(), sampling).isnan().all()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("text=learned", "text.name is 'learned'"),
        ("wrong_weight=1", "wrong_weight is 1.0"),
        ("interpolation_weight=-1", "interpolation_weight is -1.0"),
        ("discriminator.norm=batch", "r1_weight is 0.1; allowed: 0 with discriminator.norm=batch"),
        ("optimizer.schedule=step", "optimizer.halve_every_images is None; allowed: 1 or more with"),
        ("generator.noise_dim=0", "generator.noise_dim is 0"),
        ("sampling.noise_scale=-1", "sampling.noise_scale is -1.0"),
    ],
)
def test_values_that_are_not_allowed(override, sentence, compose_run):
    with pytest.raises(ConfigError, match=sentence):
        compose_run(TINY[0], override)


def test_a_batch_needs_two_captions(compose_run):
    with pytest.raises(ConfigError, match=r"trainer.batch_size is 4; allowed: 2 or more"):
        Stage(compose_run(TINY[0], "trainer.batch_size=4", "trainer.micro_batches=4"))
