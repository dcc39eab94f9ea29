import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from schedule_configs import schedule_config
from torch import Tensor

from t2i.diffusion.config import DiffusionSampling
from t2i.diffusion.guidance import classifier_free, thresholded
from t2i.diffusion.schedules import build_schedule
from t2i.interfaces import TextFeatures
from t2i.nn.guidance import guided

pytestmark = pytest.mark.usefixtures("float64")


def features(seed: int) -> TextFeatures:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 4, 3, generator=g)
    return TextFeatures(tokens, torch.randn(2, 3, generator=g), torch.rand(2, 4, generator=g) > 0.3)


class Model:
    """Depends on every input; remembers the batch sizes it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        self.batches.append(len(x))
        assert len(x) == len(t) == len(text)
        context = (text.tokens * text.mask[..., None]).sum((1, 2)) + text.pooled.sum(1)
        return torch.tanh(x + (t * context)[:, None])


X, T = torch.linspace(-1, 1, 10).view(2, 5), torch.tensor([0.3, 0.8])


SCHEDULE = build_schedule(schedule_config("flow"))


def sampling(scale: float, **changes) -> DiffusionSampling:
    return DiffusionSampling(sampler="euler", steps=4, guidance_scale=scale, **changes)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guidance_extrapolates_from_uncond_to_cond(scale):
    cond, uncond = features(0), features(1)
    out_cond, out_uncond = Model()(X, T, cond), Model()(X, T, uncond)
    assert not torch.allclose(out_cond, out_uncond)
    result = classifier_free(Model(), cond, uncond, sampling(scale), SCHEDULE)(X, T)
    torch.testing.assert_close(result, (1 - scale) * out_uncond + scale * out_cond)
    torch.testing.assert_close(guided(out_cond, out_uncond, scale), result)


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 2), (3.0, 4), (0.0, 4)])
def test_one_call_of_the_model_and_no_uncond_half_at_scale_1(scale, batch):
    model = Model()
    classifier_free(model, features(0), features(1), sampling(scale), SCHEDULE)(X, T)
    assert model.batches == [batch]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(share):
    cond, uncond = features(0), features(1)
    out_cond, out_uncond = Model()(X, T, cond), Model()(X, T, uncond)
    expected = rescale_noise_cfg(guided(out_cond, out_uncond, 7.5), out_cond, share)
    settings = sampling(7.5, guidance_rescale=share)
    result = classifier_free(Model(), cond, uncond, settings, SCHEDULE)(X, T)
    torch.testing.assert_close(result, expected)
    assert not torch.allclose(result, guided(out_cond, out_uncond, 7.5))


@pytest.mark.parametrize(
    ("above", "below", "asked"),
    [
        (None, None, [4, 4, 4]),
        (0.5, None, [4, 4, 2]),
        (None, 2.0, [2, 4, 4]),
        (0.5, 2.0, [2, 4, 2]),
        (1.0, 2.0, [2, 2, 2]),  # above, and up to
    ],
)
def test_guidance_in_an_interval_of_noise_levels(above, below, asked):
    """sigma / alpha of rectified flow is t / (1 - t); at t = 1 it is infinite."""
    cond, uncond = features(0), features(1)
    model = Model()
    settings = sampling(3.0, guidance_above=above, guidance_below=below)
    function = classifier_free(model, cond, uncond, settings, SCHEDULE)
    for t, batch in zip((1.0, 0.5, 0.25), asked, strict=True):
        times = torch.full((2,), t)
        out_cond, out_uncond = Model()(X, times, cond), Model()(X, times, uncond)
        expected = out_cond if batch == 2 else guided(out_cond, out_uncond, 3.0)
        torch.testing.assert_close(function(X, times), expected)
    assert model.batches == asked


def test_some_channels_alone_are_guided():
    cond, uncond = features(0), features(1)
    out_cond, out_uncond = Model()(X, T, cond), Model()(X, T, uncond)
    result = classifier_free(Model(), cond, uncond, sampling(3.0), SCHEDULE, channels=3)(X, T)
    torch.testing.assert_close(result[:, :3], guided(out_cond, out_uncond, 3.0)[:, :3])
    assert torch.equal(result[:, 3:], out_cond[:, 3:])


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995])
def test_dynamic_thresholding_is_that_of_diffusers(share):
    x0 = 2 * torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x0[2] *= 0.1  # one that is within [-1, 1] stays as it is
    reference = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=share, sample_max_value=100.0)
    result = thresholded(x0, share)
    torch.testing.assert_close(result, reference._threshold_sample(x0.clone()))
    assert torch.equal(result[2], x0[2])
    assert result.abs().max() <= 1


def test_pictures_are_thresholded_one_by_one(monkeypatch):
    """Older torch refuses quantiles of many numbers."""
    quantile, x0 = torch.Tensor.quantile, torch.linspace(-3, 3, 144).view(3, 3, 4, 4)

    def of_few(x: torch.Tensor, *given: object, **how: object) -> torch.Tensor:
        assert x.numel() <= 48
        return quantile(x, *given, **how)

    expected = [thresholded(each[None], 0.9) for each in x0]
    monkeypatch.setattr(torch.Tensor, "quantile", of_few)
    assert torch.equal(thresholded(x0, 0.9), torch.cat(expected))
