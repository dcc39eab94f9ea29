"""Fixed and learned variance of the reverse process, in float64.

The constants are guided-diffusion's (`GaussianDiffusion` and `SpacedDiffusion`, run in float64).
"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from t2i.diffusion.config import GridConfig, ScheduleConfig
from t2i.diffusion.objectives import Prediction, to_x0_eps
from t2i.diffusion.samplers import SAMPLERS, noise_levels, sample
from t2i.diffusion.schedules import build_schedule
from t2i.diffusion.variance import ReverseSteps, level_log_probability, log_variance, normal_kl, posterior

pytestmark = pytest.mark.usefixtures("float64")

LINEAR = ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02)
COSINE = ScheduleConfig("cosine")

X = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
X0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 2, 2)
NOISE = torch.sin(torch.arange(12, dtype=torch.float64)).reshape(1, 3, 2, 2)
PLACES = [0, 5, 11]


def network(x, t):
    """Stands in for a network that puts out the noise and, from -1 to 1, the variance."""
    time = (t / 1000).reshape(-1, 1, 1, 1)
    return torch.sin(2 * x) + 0.3 * time, 0.8 * torch.cos(x + time)


def predicted(schedule, x, t, clip):
    eps, variance = network(x, t)
    p = to_x0_eps("eps", eps, x, *schedule.alpha_sigma(t))
    x0 = p.x0.clamp(-1, 1) if clip else p.x0
    return Prediction(x0, eps, "eps", (variance + 1) / 2)


@pytest.mark.parametrize(
    ("config", "t", "mean", "log_variances"),
    [
        (LINEAR, 1, (-1.2273542479959332, -0.1341958865485624), (-9.400093876167727, -9.110373737672852)),
        (LINEAR, 500, (-1.494214583210718, -0.13579805677273132), (-4.599435562067475, -4.5993002916958385)),
        (LINEAR, 999, (-1.4850513688884481, -0.13512135306910653), (-3.9120231282862177, -3.912023202965438)),
        (COSINE, 1, (-1.2361092949746262, -0.135038972410239), (-10.33740869983048, -10.061566704756371)),
        (COSINE, 500, (-1.497402286082364, -0.1360498567175653), (-5.759420349399522, -5.758935478257945)),
        (
            COSINE,
            999,
            (-0.048990941526692144, -0.00586907806196308),
            (-0.0010008622440023074, -0.0010010822310735769),
        ),
        (LINEAR, 0, (-1.0, -0.13367673129195043), (-9.496375169119656, -9.273230505869279)),
    ],
)
def test_the_learned_range_is_guided_diffusions(config, t, mean, log_variances):
    schedule = build_schedule(config)
    times = torch.tensor([t])
    q = ReverseSteps(schedule).posterior(times, X)
    p = predicted(schedule, X, times.double(), clip=True)
    actual = (q.x0_weight * p.x0 + q.x_weight * X).flatten()[PLACES[:2]]
    torch.testing.assert_close(actual, torch.tensor(mean), rtol=1e-9, atol=1e-11)
    actual = log_variance(p.variance_share, q).flatten()[PLACES[:2]]
    torch.testing.assert_close(actual, torch.tensor(log_variances), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("config", "t", "bits", "rtol"),
    [
        (LINEAR, 1, 0.7384785375688013, 1e-9),
        (LINEAR, 500, 0.0006513393732791425, 1e-7),
        (LINEAR, 999, 0.0020600920784615974, 1e-7),
        (COSINE, 1, 0.7042074798291017, 1e-9),
        (COSINE, 999, 101.26566519721744, 1e-9),
        # There the normal distribution is a tanh, off by 3e-4; here it is exact.
        (LINEAR, 0, 2.6071088292871933, 2e-3),
        (COSINE, 0, 1.9829514432789626, 2e-3),
    ],
)
def test_the_bound_is_guided_diffusions(config, t, bits, rtol):
    schedule = build_schedule(config)
    times = torch.tensor([t])
    x_t = schedule.add_noise(X0, NOISE, times.double())
    p = predicted(schedule, x_t, times.double(), clip=False)
    bound = ReverseSteps(schedule).bound(X0, x_t, times, p.x0, p.variance_share)
    torch.testing.assert_close(bound, torch.tensor([bits]), rtol=rtol, atol=0.0)


def test_the_bound_is_zero_where_the_step_is_the_posteriors():
    schedule = build_schedule(COSINE)
    t = torch.tensor([7])
    x_t = schedule.add_noise(X0, NOISE, t.double())
    steps = ReverseSteps(schedule)
    nothing = torch.zeros_like(X0)
    assert steps.bound(X0, x_t, t, X0, nothing).abs().item() < 1e-12
    assert steps.bound(X0, x_t, t, X0, nothing + 1).item() > 1e-3
    assert steps.bound(X0, x_t, t, X0 + 0.1, nothing).item() > 1e-3


def test_a_batch_is_judged_sample_by_sample():
    schedule = build_schedule(LINEAR)
    steps, t = ReverseSteps(schedule), torch.tensor([0, 3, 900])
    x0 = torch.cat([X0, 0.5 * X0, -X0])
    x_t = schedule.add_noise(x0, NOISE.expand(3, -1, -1, -1), t.double())
    p = predicted(schedule, x_t, t.double(), clip=False)
    together = steps.bound(x0, x_t, t, p.x0, p.variance_share)
    for i in range(3):
        one = slice(i, i + 1)
        alone = steps.bound(x0[one], x_t[one], t[one], p.x0[one], p.variance_share[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=0.0)


def test_kl_against_torch():
    normal = torch.distributions.Normal
    a, b = normal(torch.tensor(0.3), torch.tensor(0.7)), normal(torch.tensor(-0.2), torch.tensor(1.9))
    expected = torch.distributions.kl_divergence(a, b)
    actual = normal_kl(a.mean, 2 * a.scale.log(), b.mean, 2 * b.scale.log())
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(("mean", "scale"), [(0.1, 0.3), (-0.9, 0.05), (1.3, 1.0)])
def test_the_levels_share_all_probability(mean, scale):
    levels = torch.linspace(-1, 1, 256)
    log_scale = torch.full_like(levels, math.log(scale))
    probability = level_log_probability(levels, torch.full_like(levels, mean), log_scale).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("config", "spacing", "betas", "variances"),
    [
        (
            LINEAR,
            "linspace",
            (0.6813432793614904, 0.9963257964374774),
            (9.99953233292451e-05, 0.9854216944985987),
        ),
        (
            LINEAR,
            "leading",
            (0.47852482186365886, 0.9575796900416339),
            (9.998910362988554e-05, 0.8860071539557166),
        ),
        (
            COSINE,
            "linspace",
            (0.257994613776093, 0.9999999901269861),
            (4.127932350121836e-05, 0.7539994363096768),
        ),
        (
            COSINE,
            "leading",
            (0.15407709023152782, 0.7091550701925955),
            (4.127486941765624e-05, 0.42021425197689827),
        ),
    ],
)
def test_respacing_to_4_and_ddim4(config, spacing, betas, variances):
    """guided-diffusion's "4" is linspace, its "ddim4" is leading without offset."""
    schedule = build_schedule(config)
    grid = GridConfig(timestep_spacing=spacing, steps_offset=0)
    levels = noise_levels(SAMPLERS["ddpm"], schedule, 4, spacing, grid)
    expected = {"linspace": [999, 666, 333, 0], "leading": [750, 500, 250, 0]}[spacing]
    assert levels.t == expected
    for i, beta, variance in zip((2, 0), betas, variances, strict=True):
        q = posterior(*levels.level(i), *levels.level(i + 1))
        assert q.beta == pytest.approx(beta, rel=1e-8)
        assert q.variance == pytest.approx(variance, rel=1e-8)
    assert posterior(*levels.level(3), *levels.level(4)).variance == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LINEAR, (-0.7265721141649236, -0.2797973728422817, 0.1102784323379092, 0.18405311628147478)),
        (COSINE, (-0.9170123358706174, -0.29324885767746456, 0.1977086380462276, -0.7840052993636754)),
    ],
)
def test_a_walk_with_learned_variance_is_guided_diffusions(config, expected, monkeypatch):
    """Four steps, x_0 clipped, with the noise cos(k + steps left)."""
    schedule, left = build_schedule(config), iter((3, 2, 1))

    def noise_like(self, x):
        return torch.cos(torch.arange(12.0) + next(left)).reshape(x.shape)

    monkeypatch.setattr(SAMPLERS["ddpm"], "noise_like", noise_like)
    grid = GridConfig(timestep_spacing="linspace")
    x = sample(lambda x, t: predicted(schedule, x, t, clip=True), X, schedule, "ddpm", 4, grid=grid)
    places = [0, 3, 5, 6]
    torch.testing.assert_close(x.flatten()[places], torch.tensor(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("share", "name"), [(0.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_range_are_the_fixed_variances(share, name):
    """Against diffusers, which has no noise of its own to be given: the same generator draws the same."""
    schedule = build_schedule(LINEAR)
    reference = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type=name, clip_sample=False, timestep_spacing="linspace"
    )
    reference.set_timesteps(10)
    x = theirs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def denoise(x, t):
        eps = network(x, t)[0]
        p = to_x0_eps("eps", eps, x, *schedule.alpha_sigma(t))
        return Prediction(p.x0, p.eps, "eps", torch.full_like(x, share))

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    ours = sample(
        denoise, x, schedule, "ddpm", 10, grid=GridConfig(timestep_spacing="linspace"), generators=generators
    )
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    for t in reference.timesteps:
        eps = network(theirs, t.double().expand(2))[0]
        theirs = reference.step(eps, t, theirs, generator=generators).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # whose tables are float32


def test_without_a_share_the_walk_is_that_with_share_0():
    schedule = build_schedule(LINEAR)

    def walk(share):
        def denoise(x, t):
            p = to_x0_eps("eps", network(x, t)[0], x, *schedule.alpha_sigma(t))
            return Prediction(p.x0, p.eps, "eps", None if share is None else torch.full_like(x, share))

        generators = [torch.Generator().manual_seed(3)]
        return sample(denoise, X, schedule, "ddpm", 5, generators=generators)

    torch.testing.assert_close(walk(None), walk(0.0), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(walk(None), walk(1.0), atol=1e-3)
