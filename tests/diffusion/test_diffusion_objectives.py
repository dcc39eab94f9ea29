import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_configs import schedule_config

from t2i.diffusion.config import check_objective
from t2i.diffusion.objectives import difference_error, loss_by_time, loss_weight, target, to_x0_eps
from t2i.diffusion.schedules import build_schedule
from t2i.errors import ConfigError

pytestmark = pytest.mark.usefixtures("float64")

deterministic = settings(derandomize=True, deadline=None)

PAIRS = [(o, s) for s in ("linear", "scaled_linear", "cosine") for o in ("eps", "x0", "v")]
PAIRS += [(o, "flow") for o in ("eps", "x0", "flow")]


@pytest.mark.parametrize(("objective", "schedule_name"), PAIRS)
@deterministic
@given(seed=st.integers(0, 2**31), share=st.floats(0.001, 0.999))
def test_target_and_to_x0_eps_are_inverse(objective, schedule_name, seed, share):
    schedule = build_schedule(schedule_config(schedule_name))
    x0, eps = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    last = 1.0 if schedule_name == "flow" else 999.0
    t = torch.tensor([share, share / 2, share / 3], dtype=torch.float64) * last
    alpha, sigma = schedule.alpha_sigma(t)
    output = target(objective, x0, eps, alpha, sigma)
    prediction = to_x0_eps(objective, output, schedule.add_noise(x0, eps, t), alpha, sigma)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_v_matches_diffusers_get_velocity(beta_schedule):
    reference = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule)
    schedule = build_schedule(schedule_config(beta_schedule))
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 3, 4, 4, generator=g)
    t = torch.randint(1000, (64,), generator=g)
    v = target("v", x0, eps, *schedule.alpha_sigma(t))
    torch.testing.assert_close(v, reference.get_velocity(x0, eps, t), atol=1e-5, rtol=0)


def test_flow_target_is_the_velocity_of_x_t():
    schedule = build_schedule(schedule_config("flow"))
    x0, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    _, velocity = torch.autograd.functional.jvp(
        lambda time: schedule.add_noise(x0, eps, time), t, torch.ones_like(t)
    )
    torch.testing.assert_close(target("flow", x0, eps, *schedule.alpha_sigma(t)), velocity)


def test_eps_at_pure_noise_stays_finite():
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    prediction = to_x0_eps("eps", 0.9 * noise, noise, torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5]))
    assert torch.equal(prediction.x0[0], torch.zeros(3))
    torch.testing.assert_close(prediction.x0[1], (noise[1] - 0.45 * noise[1]) / 0.5)


@pytest.mark.parametrize(("objective", "schedule_name"), PAIRS)
def test_min_snr_weighs_the_error_in_x0(objective, schedule_name):
    """An output error, weighted, is the x0 error times min(SNR, gamma), whatever the objective."""
    gamma = 5.0
    schedule = build_schedule(schedule_config(schedule_name))
    g = torch.Generator().manual_seed(0)
    x0, eps, error = torch.randn(3, 40, 7, generator=g, dtype=torch.float64)
    t = torch.linspace(0.01, 0.95, 40, dtype=torch.float64) * (1 if schedule_name == "flow" else 999)
    alpha, sigma = schedule.alpha_sigma(t)
    output = target(objective, x0, eps, alpha, sigma) + error
    prediction = to_x0_eps(objective, output, schedule.add_noise(x0, eps, t), alpha, sigma)
    snr = alpha**2 / sigma**2
    assert snr.min() < gamma < snr.max()
    expected = torch.minimum(snr, torch.full_like(snr, gamma)) * ((prediction.x0 - x0) ** 2).mean(1)
    weighted = loss_weight(objective, schedule.snr(t), gamma) * (error**2).mean(1)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-9)


@deterministic
@given(snr=st.floats(1e-6, 1e6), gamma=st.floats(0.1, 20))
def test_min_snr_matches_the_published_formulas(snr, gamma):
    # Hang et al. section 3.4 for x0, eps and v.
    for objective, expected in {
        "x0": min(snr, gamma),
        "eps": min(snr, gamma) / snr,
        "v": min(snr, gamma) / (snr + 1),
    }.items():
        weight = loss_weight(objective, torch.tensor([snr], dtype=torch.float64), gamma)
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["eps", "x0", "v", "flow"])
def test_weights_are_finite_at_both_ends_and_one_without_gamma(objective):
    ends = torch.tensor([0.0, math.inf])
    assert loss_weight(objective, ends, 5.0).isfinite().all()
    assert torch.equal(loss_weight(objective, ends, None), torch.ones(2))


def test_objectives_that_a_schedule_does_not_define_are_refused():
    for objective, schedule_name in PAIRS:
        check_objective(objective, schedule_config(schedule_name))
    with pytest.raises(ConfigError, match="objective is 'flow'; allowed: eps, x0, v with"):
        check_objective("flow", schedule_config("cosine"))
    with pytest.raises(ConfigError, match="objective is 'v'; allowed: eps, x0, flow"):
        check_objective("v", schedule_config("flow"))
    with pytest.raises(ConfigError, match="objective is 'eps'; allowed: x0, v with"):
        check_objective("eps", schedule_config("linear", zero_terminal_snr=True))


def test_unknown_objective_raises():
    x = torch.zeros(1, 2)
    for call in (
        lambda: target("epsilon", x, x, x[0], x[0]),
        lambda: to_x0_eps("epsilon", x, x, x[0, :1], x[0, :1]),
        lambda: loss_weight("epsilon", x[0], 5.0),
    ):
        with pytest.raises(ValueError, match="objective is 'epsilon'; allowed: eps, x0, v, flow"):
            call()


def test_differences_weigh_an_error_by_its_frequency():
    """On a map that wraps, a wave of (a, b) per pixel would count by 4 sin^2(a / 2) + 4 sin^2(b / 2): here the map is
    mirrored at its edges, whose waves are those of the cosine transform, with one neighbour fewer than positions."""
    height, width = 6, 10
    row, column = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    for p, q in ((0, 0), (0, 3), (2, 0), (5, 9), (1, 4)):
        a, b = math.pi * p / height, math.pi * q / width
        wave = (a * (row + 0.5)).cos()[:, None] * (b * (column + 0.5)).cos()
        power = wave.square().mean()
        rows, columns = 4 * math.sin(a / 2) ** 2, 4 * math.sin(b / 2) ** 2
        expected = power * (rows * height / (height - 1) + columns * width / (width - 1))
        found = difference_error(wave[None, None].expand(2, 3, -1, -1))
        torch.testing.assert_close(found, expected.expand(2), rtol=1e-12, atol=1e-12)


def test_the_mean_is_best_with_differences_too():
    """Of what x0 may be, given x_t: the gradient there is zero."""
    possible = torch.rand(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answer = possible.mean(0, keepdim=True).requires_grad_()
    difference_error(answer - possible).mean().backward()
    assert difference_error(answer - possible).min() > 0.1
    torch.testing.assert_close(answer.grad, torch.zeros_like(answer), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_losses_by_time_are_sums_and_numbers_of_each_quarter(name):
    schedule = build_schedule(schedule_config(name))
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.9999], dtype=torch.float64)
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64, requires_grad=True)
    found = loss_by_time(losses, schedule.training_times(uniform), schedule)
    assert {name: pair.tolist() for name, pair in found.items()} == {
        "loss_time_0_25": [3.0, 2.0],
        "loss_time_25_50": [4.0, 1.0],
        "loss_time_50_75": [8.0, 1.0],
        "loss_time_75_100": [16.0, 1.0],
    }
    assert not any(pair.requires_grad for pair in found.values())
    ends = loss_by_time(losses[:1], schedule.training_times(uniform[:1]) * 0, schedule)
    assert ends["loss_time_75_100"].tolist() == [0.0, 0.0]
