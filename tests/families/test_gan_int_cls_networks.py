"""GAN-INT-CLS's networks against the layers of the published code, and its experiment against the paper's settings."""

import pytest
import torch
from torch import nn

from t2i.config import parse_run, run_to_dict
from t2i.errors import ConfigError
from t2i.families.gan_int_cls.config import Config
from t2i.families.gan_int_cls.networks import Discriminator, GeneratorNetwork, num_levels
from t2i.families.gan_int_cls.plan import planned_networks
from t2i.planning.model import build_model


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def published(compose_run):
    """Generator and discriminator of the published shape, on the meta device."""
    config = compose_run("experiment=gan_int_cls/64").model
    with torch.device("meta"):
        return GeneratorNetwork(config.generator, 1024, 64), Discriminator(config.discriminator, 1024, 64)


def test_the_published_networks_have_the_parameters_of_their_code(published):
    """Counted by hand from the layers of reedscot/icml2016 main_cls_int.lua with ngf 128, ndf 64, nz 100, nt 128 and
    txtSize 1024, without the biases of its convolutions, which it sets to zero before each step."""
    generator, discriminator = published
    caption = 1024 * 128 + 128
    g_convolutions = 228 * 1024 * 16 + 1024 * 512 * 16 + 512 * 256 * 16 + 256 * 128 * 16 + 128 * 3 * 16
    g_residual = 1024 * 256 + 256 * 256 * 9 + 256 * 1024 * 9 + 512 * 128 + 128 * 128 * 9 + 128 * 512 * 9
    g_norms = 2 * (1024 + 256 + 256 + 1024 + 512 + 128 + 128 + 512 + 256 + 128)
    assert count(generator) == caption + g_convolutions + g_residual + g_norms == 18_905_472
    d_convolutions = 3 * 64 * 16 + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 512 * 16
    d_residual = 512 * 128 + 128 * 128 * 9 + 128 * 512 * 9
    d_head = (512 + 128) * 512 + 512 * 16
    d_norms = 2 * (128 + 256 + 512 + 128 + 128 + 512 + 128 + 512)
    assert count(discriminator) == caption + d_convolutions + d_residual + d_head + d_norms == 4_030_080


def test_the_published_layers_in_their_order(published):
    generator, discriminator = published

    def weights(module):
        kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
        return [(type(m).__name__, *m.weight.shape) for m in module.modules() if isinstance(m, kinds)]

    assert weights(generator) == [
        ("Linear", 128, 1024),
        ("ConvTranspose2d", 228, 1024, 4, 4),
        ("Conv2d", 256, 1024, 1, 1),
        ("Conv2d", 256, 256, 3, 3),
        ("Conv2d", 1024, 256, 3, 3),
        ("ConvTranspose2d", 1024, 512, 4, 4),
        ("Conv2d", 128, 512, 1, 1),
        ("Conv2d", 128, 128, 3, 3),
        ("Conv2d", 512, 128, 3, 3),
        ("ConvTranspose2d", 512, 256, 4, 4),
        ("ConvTranspose2d", 256, 128, 4, 4),
        ("ConvTranspose2d", 128, 3, 4, 4),
    ]
    assert weights(discriminator) == [
        ("Conv2d", 64, 3, 4, 4),
        ("Conv2d", 128, 64, 4, 4),
        ("Conv2d", 256, 128, 4, 4),
        ("Conv2d", 512, 256, 4, 4),
        ("Conv2d", 128, 512, 1, 1),
        ("Conv2d", 128, 128, 3, 3),
        ("Conv2d", 512, 128, 3, 3),
        ("Linear", 128, 1024),
        ("Conv2d", 512, 640, 1, 1),
        ("Conv2d", 1, 512, 4, 4),
    ]
    sizes = []
    for layer in generator.layers:
        layer.register_forward_hook(lambda module, given, made: sizes.append(tuple(made.shape[1:])))
    with torch.device("meta"):
        made = generator(torch.zeros(2, 100), torch.zeros(2, 1024))
        assert discriminator(made, torch.zeros(2, 1024)).shape == (2,)
    assert list(dict.fromkeys(sizes)) == [
        (1024, 4, 4),
        (512, 8, 8),
        (256, 16, 16),
        (128, 32, 32),
        (3, 64, 64),
    ]


def test_where_the_published_discriminator_has_activations(published):
    kinds = [type(layer).__name__ for layer in published[1].layers]
    first, middle = ["Conv2d", "LeakyReLU"], ["Conv2d", "BatchNorm2d"]
    assert kinds == [*first, *middle, "LeakyReLU", *middle, *middle, "Bottleneck"]


def test_initial_weights(compose_run):
    config = compose_run("experiment=gan_int_cls/64").model
    network = Discriminator(config.discriminator, 1024, 64)
    convolutions = [m.weight.flatten() for m in network.modules() if isinstance(m, nn.Conv2d)]
    weights = torch.cat(convolutions)
    assert weights.mean().abs() < 1e-3
    assert abs(weights.std() - 0.02) < 2e-4
    scales = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert abs(scales.mean() - 1) < 5e-3
    assert abs(scales.std() - 0.02) < 2e-3


@pytest.mark.parametrize(("size_px", "levels"), [(16, 2), (32, 3), (64, 4), (256, 6)])
def test_sizes(size_px, levels):
    assert num_levels(size_px) == levels


@pytest.mark.parametrize("size_px", [8, 20, 48, 100])
def test_other_sizes_are_refused(size_px):
    with pytest.raises(ConfigError, match=f"resolution.size_px is {size_px}; allowed: 16, 32"):
        num_levels(size_px)


def test_the_published_settings(compose_run):
    config = compose_run("experiment=gan_int_cls/64")
    assert config.trainer.batch_size == 64
    assert config.trainer.num_images == 600 * 8855
    assert config.optimizer.learning_rate == 2e-4
    assert config.optimizer.betas == (0.5, 0.999)
    assert (config.optimizer.weight_decay, config.optimizer.gradient_clip, config.ema) == (0.0, 0.0, None)
    model = config.model
    assert isinstance(model, Config)
    assert (model.wrong_weight, model.interpolation_weight, model.r1_weight) == (0.5, 1.0, 0.0)
    assert (config.optimizer.schedule, config.optimizer.halve_every_images) == ("step", 100 * 8855)
    assert config.resolution.text_dropout == 0.0
    assert parse_run(run_to_dict(config), Config) == config


def test_the_plan_counts_the_published_networks_and_their_calls(compose_run):
    networks = {n.name: n for n in planned_networks(compose_run("experiment=gan_int_cls/64"), {})}
    assert {name for name, network in networks.items() if network.trained} == {"generator", "discriminator"}
    assert networks["generator"].parameters == 18_905_472
    assert networks["discriminator"].parameters == 4_030_080
    assert networks["generator"].calls_per_image == pytest.approx(1.5 + 1 / 3)
    assert networks["discriminator"].calls_per_image == pytest.approx(2 + 1.5 * 2 / 3)
    plain = planned_networks(
        compose_run(
            "stage=gan_int_cls", "wrong_weight=0", "interpolation_weight=0", "r1_weight=1", "r1_every=4"
        ),
        {},
    )
    assert [n.calls_per_image for n in plain[:2]] == pytest.approx([1 + 1 / 3, 2 + 1 / 4 + 2 / 3])


def test_a_plan_is_made(compose_run):
    model = build_model(compose_run("stage=gan_int_cls"), {}, device="cpu")
    generator, discriminator, text = model.parts
    assert generator.flops.forward > 0
    assert discriminator.flops.backward > discriminator.flops.forward
    assert (text.trained, text.flops.backward) == (False, 0)
    assert (generator.averaged, discriminator.averaged) == (generator.parameters, 0)
