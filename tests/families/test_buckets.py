"""Pictures of several aspect ratios: the sides that data.bucket_step_px gives are the model's, or it is refused before
the first step."""

from __future__ import annotations

import pytest

from t2i import families
from t2i.errors import ConfigError

SQUARE = r"null with this model, whose grid of codes is square"


@pytest.fixture
def build(compose_run, tiny_kl, tiny_vq):
    def build(name: str, *typed: str) -> None:
        builds_on = families.get(compose_run(f"experiment={name}").family).builds_on
        codec = {"codec": tiny_kl, "token_codec": tiny_vq}
        given = [f"builds_on.{key}={codec[part]}" for key, part in builds_on.items()]
        config = compose_run(f"experiment={name}", *given, *typed)
        families.get(config.family).load_stage(config.stage)(config)

    return build


@pytest.mark.parametrize(
    ("name", "step", "allowed"),
    [
        ("autoencoder/tiny_vq", 6, r"multiples of 4, the codec's downsampling"),
        ("latent_diffusion/tiny_unet_eps", 4, r"multiples of 8 with this model"),
        ("pixel_diffusion/tiny_cosine_learned", 4, r"multiples of 8 with this model"),
        ("pixel_diffusion/tiny_linear_x0_classifier", 6, r"multiples of 8 with this model"),
        ("masked/tiny_masked", 6, r"multiples of 4, the pixels of a code along a side"),
        ("gan_int_cls/tiny_r1", 8, r"null with this model, which takes squares"),
        ("autoregressive/tiny_ar", 8, SQUARE),
    ],
)
def test_sides_that_are_not_the_models_are_refused(build, name, step, allowed):
    with pytest.raises(ConfigError, match=rf"^data\.bucket_step_px is {step}; allowed: {allowed}"):
        build(name, f"data.bucket_step_px={step}")


def test_positions_of_one_shape_take_no_other(build):
    with pytest.raises(ConfigError, match=SQUARE):
        build("masked/tiny_masked", "transformer.positions=learned", "data.bucket_step_px=8")


@pytest.mark.parametrize(
    "name",
    [
        "autoencoder/tiny_vq",
        "latent_diffusion/tiny_unet_eps",
        "pixel_diffusion/tiny_linear_x0_classifier",
        "masked/tiny_masked",
    ],
)
def test_others_are_taken(build, name):
    build(name, "data.bucket_step_px=8")
