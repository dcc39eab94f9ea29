"""The pixel diffusion model: losses, guidance and pictures, in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from pixel_models import CLASSIFIER, CONFIG, SAMPLING, build, pictures, request
from torch import Tensor

from t2i import families
from t2i.diffusion.config import ScheduleConfig
from t2i.diffusion.objectives import Prediction, to_x0_eps
from t2i.diffusion.samplers import sample
from t2i.diffusion.schedules import build_schedule
from t2i.diffusion.variance import ReverseSteps
from t2i.errors import ConfigError
from t2i.families.pixel_diffusion.classifier import NoisyMatcher, towards
from t2i.families.pixel_diffusion.config import ObjectiveConfig
from t2i.families.pixel_diffusion.model import PixelDiffusion
from t2i.interfaces import TextFeatures

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_simple_loss(prediction: str) -> None:
    model = build(objective=ObjectiveConfig(prediction, None))  # type: ignore[arg-type]
    image, eps = pictures()
    t = torch.tensor([100, 900])
    alpha, sigma = model.schedule.alpha_sigma(t.double())
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    text = model.text(["a red circle", ""])
    output = model.denoise(alpha * image + sigma * eps, t.double(), text)
    expected = {"eps": eps, "v": alpha * eps - sigma * image, "x0": image}[prediction]
    loss = model.losses(image, text, t.double(), eps)
    assert loss.keys() == {"loss"}
    torch.testing.assert_close(loss["loss"], (output - expected).square().mean((1, 2, 3)))


def test_the_snr_weighs_between_its_limits() -> None:
    model = build(objective=ObjectiveConfig("x0", None, max_snr=5.0))
    plain = build(objective=ObjectiveConfig("x0", None))
    image, eps = (each.repeat(2, 1, 1, 1) for each in pictures())
    t = torch.tensor([5.0, 300.0, 500.0, 900.0], dtype=torch.float64)
    ratio = (
        model.losses(image, model.text([""] * 4), t, eps)["loss"]
        / plain.losses(image, plain.text([""] * 4), t, eps)["loss"]
    )
    snr = model.schedule.snr(t)
    assert 1 < snr[1] < 5
    torch.testing.assert_close(
        ratio, torch.stack([t.new_tensor(5.0), snr[1], t.new_tensor(1.0), t.new_tensor(1.0)])
    )


def test_outlines_weigh_in_the_error_of_x0() -> None:
    """The SNR weighs both parts of it."""
    model = build(objective=ObjectiveConfig("x0", None, max_snr=5.0, edge_weight=3.0))
    image, eps = pictures()
    t, text = torch.tensor([300.0, 900.0]), model.text(["a red circle", ""])
    error = model.denoise(model.schedule.add_noise(image, eps, t), t, text) - image
    across, down = error[..., 1:] - error[..., :-1], error[:, :, 1:] - error[:, :, :-1]
    squares = [each.square().mean((1, 2, 3)) for each in (error, across, down)]
    weight = model.schedule.snr(t).clamp(1, 5)
    expected = weight * (squares[0] + 3 * squares[1] + 3 * squares[2])
    torch.testing.assert_close(model.losses(image, text, t, eps)["loss"], expected)


def test_the_hybrid_loss_adds_the_bound_which_trains_the_variance_alone() -> None:
    model = build(variance="learned")
    image, eps = pictures()
    t, text = torch.tensor([3, 800]), model.text(["a red circle", "a star"])
    losses = model.losses(image, text, t, eps)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["bits"])  # T / 1000 is 1
    last = model.denoiser.unet.out[2].weight
    of_bound = torch.autograd.grad(losses["bits"].sum(), last, retain_graph=True)[0]
    of_square = torch.autograd.grad(losses["mse"].sum(), last)[0]
    assert not of_bound[:3].any()
    assert of_bound[3:].abs().min() > 0
    assert not of_square[3:].any()
    x_t = model.schedule.add_noise(image, eps, t)
    output = model.denoise(x_t, t, text)
    x0 = to_x0_eps("eps", output[:, :3], x_t, *model.schedule.alpha_sigma(t)).x0
    bound = ReverseSteps(model.schedule).bound(image, x_t, t, x0, (output[:, 3:] + 1) / 2)  # type: ignore[arg-type]
    torch.testing.assert_close(losses["bits"], bound, rtol=1e-4, atol=1e-8)


@torch.no_grad()
def test_a_learned_variance_is_not_guided() -> None:
    model = build(variance="learned")
    image, _ = pictures()
    text, negative = model.text(["a red circle", "a star"]), model.text(["", ""])
    t = torch.tensor([500.0, 20.0])
    plain = model.predictor(text, negative, SAMPLING)(image, t)
    guided = model.predictor(text, negative, dataclasses.replace(SAMPLING, guidance_scale=3.0))(image, t)
    assert plain.variance_share is not None
    assert guided.variance_share is not None
    torch.testing.assert_close(plain.variance_share, guided.variance_share)
    assert not torch.allclose(plain.x0, guided.x0, atol=1e-3)


@torch.no_grad()
def test_guidance_is_classifier_free_in_the_networks_output() -> None:
    model = build()
    image, _ = pictures()
    text, negative = model.text(["a red circle", "a star"]), model.text(["", "blue"])
    t = torch.tensor([500.0, 20.0])
    free = dataclasses.replace(SAMPLING, clip_x0=False)
    cond, uncond = (model.predictor(each, negative, free)(image, t).eps for each in (text, negative))
    actual = model.predictor(text, negative, dataclasses.replace(free, guidance_scale=2.5))(image, t).eps
    torch.testing.assert_close(actual, uncond + 2.5 * (cond - uncond))


@torch.no_grad()
def test_clipped_pictures_keep_x_t() -> None:
    model = build()
    x, t = 3 * pictures()[1], torch.tensor([700.0, 300.0])
    text = model.text(["", ""])
    p = model.predictor(text, text, SAMPLING)(x, t)
    assert p.x0.abs().max() == 1
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in model.schedule.alpha_sigma(t.double()))
    torch.testing.assert_close(alpha * p.x0 + sigma * p.eps, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_draws_by_its_seeds_alone(variance: str) -> None:
    model = build(variance=variance)
    sampling = dataclasses.replace(SAMPLING, sampler="ddpm", guidance_scale=2.0)
    both = model.generate(request(), sampling)
    assert both.shape == (2, 3, 16, 16)
    assert both.abs().max() <= 1
    alone = model.generate(request(prompts=["a blue star"], seeds=[1]), sampling)
    torch.testing.assert_close(both[1:], alone)
    other = model.generate(request(seeds=[0, 2]), sampling)
    torch.testing.assert_close(other[0], both[0])
    assert not torch.allclose(other[1], both[1], atol=1e-3)


def test_starts_from_a_picture() -> None:
    model = build()
    image = pictures()[0]
    steps = dataclasses.replace(SAMPLING, steps=20)
    near = model.generate(request(image=image, strength=0.05), steps)
    far = model.generate(request(image=image, strength=1.0), steps)
    assert (near - image).abs().mean() < (far - image).abs().mean()


def test_a_size_that_does_not_halve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^height is 15; allowed: multiples of 2"):
        build().generate(request(height_px=15), SAMPLING)
    with pytest.raises(ConfigError, match=r"^width is 18; allowed: multiples of 4"):
        build(classifier=CLASSIFIER).generate(request(width_px=18), SAMPLING)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("text_width", {"text_width": 0}),
        ("objective", {"objective": ObjectiveConfig("flow", None)}),
        (
            "variance",
            {
                "schedule": ScheduleConfig("flow", shift=1.0),
                "objective": ObjectiveConfig("flow", None),
                "variance": "learned",
            },
        ),
        ("sampling.classifier_scale", {"sampling": dataclasses.replace(SAMPLING, classifier_scale=1.0)}),
    ],
)
def test_config_refuses(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is .*; allowed: "):
        dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("max_snr", ("x0", None, 0.5)),
        ("max_snr", ("x0", 5.0, 5.0)),
        ("max_snr", ("eps", None, 5.0)),
        ("min_snr_gamma", ("eps", 0.0)),
        ("edge_weight", ("x0", None, None, -1.0)),
        ("edge_weight", ("eps", None, None, 8.0)),
    ],
)
def test_objective_refuses(key: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"^objective\.{key} is .*; allowed: "):
        ObjectiveConfig(*values)


# Classifier guidance.

SPREAD, MEANS = 0.3, torch.tensor([-0.8, 0.5], dtype=torch.float64)


def gaussian_score(x: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of x_t where x_0 ~ N(mean, SPREAD^2)."""
    return (alpha * mean - x) / (alpha**2 * SPREAD**2 + sigma**2)


def mixture(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The score of x_t, and p(y | x_t) (2, ...), where x_0 is of either class, equally often."""
    variance = alpha**2 * SPREAD**2 + sigma**2
    logits = torch.stack([-((x - alpha * mean) ** 2) / (2 * variance) for mean in MEANS])
    p = logits.softmax(0)
    return sum(p[i] * gaussian_score(x, MEANS[i], alpha, sigma) for i in range(2)), p  # type: ignore[return-value]


def guided_by_the_true_classifier(schedule: Any, y: int, scale: float) -> Any:
    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t)
        a, s = alpha.view(-1, 1), sigma.view(-1, 1)
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            gradient = torch.autograd.grad(mixture(x_in, a, s)[1][y].log().sum(), x_in)[0]
        p = to_x0_eps("eps", -s * mixture(x, a, s)[0], x, alpha, sigma)
        return towards(p, gradient, scale, alpha, sigma)

    return predict


@pytest.mark.parametrize("y", [0, 1])
def test_with_the_true_classifier_the_guided_score_is_the_classs(y: int) -> None:
    schedule = build_schedule(ScheduleConfig("cosine"))
    x = torch.linspace(-2, 2, 12).view(4, 3)
    t = torch.tensor([10.0, 300.0, 600.0, 990.0], dtype=torch.float64)
    alpha, sigma = (each.view(-1, 1) for each in schedule.alpha_sigma(t))
    p = guided_by_the_true_classifier(schedule, y, 1.0)(x, t)
    torch.testing.assert_close(
        -p.eps / sigma, gaussian_score(x, MEANS[y], alpha, sigma), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(alpha * p.x0 + sigma * p.eps, x, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(guided_by_the_true_classifier(schedule, y, 0.0)(x, t).eps, p.eps, atol=1e-3)


@pytest.mark.parametrize("y", [0, 1])
def test_a_guided_walk_ends_in_the_class(y: int) -> None:
    """The probability flow of a Gaussian is affine: noise z ends on mean + SPREAD z."""
    schedule = build_schedule(ScheduleConfig("cosine"))
    z = torch.linspace(-1.5, 1.5, 6).view(6, 1)
    x = sample(guided_by_the_true_classifier(schedule, y, 1.0), z, schedule, "euler", 400)
    torch.testing.assert_close(x, MEANS[y] + SPREAD * z, rtol=0, atol=0.02)


def features(captions: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(captions, 5, dtype=torch.bool)
    return TextFeatures(torch.randn(captions, 5, 16, generator=generator), torch.zeros(captions, 16), mask)


def matcher() -> NoisyMatcher:
    torch.manual_seed(0)
    made = NoisyMatcher(CLASSIFIER, 16, 16).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made


def test_the_classifiers_gradient_is_that_of_the_fit() -> None:
    made, x, text = matcher(), pictures()[0], features(2)
    t = torch.tensor([100.0, 700.0])
    gradient = made.gradient(x, t, text)
    step = torch.zeros_like(x)
    step[0, 1, 3, 4] = step[1, 2, 8, 9] = 1e-6

    def fit(x: Tensor) -> Tensor:
        pictures, texts = made.embed(x, t, text.tokens, text.mask)
        return (pictures * texts).sum(1)

    with torch.no_grad():
        slope = (fit(x + step) - fit(x - step)) / 2e-6
    expected = torch.stack([gradient[0, 1, 3, 4], gradient[1, 2, 8, 9]])
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-8)
    assert expected.abs().min() > 1e-7


def test_the_classifiers_loss_is_clips_without_dropped_captions() -> None:
    made, x = matcher(), torch.cat(pictures())
    t, text = torch.tensor([100.0, 700.0, 5.0, 300.0]), features(4)
    loss = made.loss(x, t, text, ["a", "b", "", "c"])
    rows = [0, 1, 3]
    pictures_, texts = (each[rows] for each in made.embed(x, t, text.tokens, text.mask))
    logits = pictures_ @ texts.T
    answer = torch.arange(3)
    expected = (
        torch.nn.functional.cross_entropy(logits, answer)
        + torch.nn.functional.cross_entropy(logits.T, answer)
    ) / 2
    torch.testing.assert_close(loss, expected)
    assert made.loss(x, t, text, [""] * 4).item() == 0


def test_equal_captions_share_the_answer() -> None:
    made, x = matcher(), pictures()[0]
    one = features(1)
    twice = TextFeatures(one.tokens.repeat(2, 1, 1), one.pooled.repeat(2, 1), one.mask.repeat(2, 1))
    loss = made.loss(x, torch.tensor([100.0, 700.0]), twice, ["a", "a"])
    pictures_, texts = made.embed(x, torch.tensor([100.0, 700.0]), twice.tokens, twice.mask)
    by_picture = (pictures_ @ texts.T).T.log_softmax(1)  # which of two pictures a caption has cannot be told
    expected = (math.log(2) - by_picture.mean()) / 2
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
def test_the_classifier_takes_other_sizes() -> None:
    made = matcher()
    x = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(3))
    assert made.encoder(x, torch.tensor([5.0])).shape == (1, 8)


def test_classifier_guidance_moves_what_is_drawn() -> None:
    model = build(classifier=CLASSIFIER)
    plain = model.generate(request(), SAMPLING)
    guided = model.generate(request(), dataclasses.replace(SAMPLING, classifier_scale=5.0))
    assert not torch.allclose(plain, guided, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny_cosine_learned", "tiny_flow_dit", "tiny_linear_x0_classifier"])
def test_the_plan_has_the_networks_of_the_run(name: str, compose_run: Any) -> None:
    config = compose_run(f"experiment=pixel_diffusion/{name}")
    networks = {each.name: each for each in families.get("pixel_diffusion").load_plan()(config, {})}
    model = PixelDiffusion(config.model, 32)
    assert networks["denoiser"].parameters == sum(p.numel() for p in model.denoiser.parameters())
    assert ("classifier" in networks) == (model.classifier is not None)
    if model.classifier is not None:
        assert networks["classifier"].parameters == sum(p.numel() for p in model.classifier.parameters())
    with torch.device("meta"):
        for each in networks.values():
            assert each.module(**each.inputs(3)).shape[0] == 3
