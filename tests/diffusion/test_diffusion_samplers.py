"""Samplers against diffusers, step for step, and against the exact solution for Gaussian data."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from t2i.diffusion.config import ScheduleConfig
from t2i.diffusion.objectives import Prediction, to_x0_eps
from t2i.diffusion.samplers import SAMPLERS, NoiseLevels, sample
from t2i.diffusion.schedules import build_schedule

DIFFUSERS_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
DIFFUSERS_OBJECTIVE = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def toy(x, t):
    """Stands in for a network: nonlinear, mixes neighbours, and close to x where t is high, so that an eps or
    v output leaves x0 bounded. x: (B, C, H, W); t: (B,) or a scalar on the scale 0 to 1000."""
    share = t.reshape(-1, 1, 1, 1) / 1000
    return x + 0.3 * (1 - share) * torch.sin(2 * x + torch.roll(x, 1, dims=-1) + 3 * share)


def toy_denoise(schedule, objective):
    def denoise(x, t):
        output = toy(x, schedule.model_time(t))
        return to_x0_eps(objective, output, x, *schedule.alpha_sigma(t))

    return denoise


def start(dtype=torch.float32):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


def reference_walk(reference, noise, steps, **step_options):
    """diffusers' loop from x_T = noise: all its states, brought from the scheduler's own variables to x_t."""
    reference.set_timesteps(steps)
    euler = isinstance(reference, EulerDiscreteScheduler)
    x = noise * (reference.sigmas[0] ** 2 + 1) ** 0.5 if euler else noise
    states = []
    for i, t in enumerate(reference.timesteps):
        output = toy(reference.scale_model_input(x, t), t.to(x.dtype))
        x = reference.step(output, t, x, **step_options).prev_sample
        states.append(x / (reference.sigmas[i + 1] ** 2 + 1) ** 0.5 if euler else x)
    return states


def our_walk(sampler, name, objective, noise, steps, spacing, **options):
    schedule = build_schedule(ScheduleConfig(name))
    states = []
    inner = toy_denoise(schedule, objective)

    def denoise(x, t):
        states.append(x)
        return inner(x, t)

    states.append(sample(denoise, noise, schedule, sampler, steps, spacing=spacing, **options))
    return states[1:]


REFERENCES = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
}


@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", DIFFUSERS_NAME)
@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [
        ("ddim", "leading"),
        ("ddim", "trailing"),
        ("euler", "leading"),
        ("euler", "linspace"),
        ("euler", "trailing"),
        ("dpmpp_2m", "leading"),
        ("dpmpp_2m", "linspace"),
        ("dpmpp_2m", "trailing"),
    ],
)
@pytest.mark.parametrize("steps", [10, 50])
def test_every_step_matches_diffusers(sampler, spacing, name, objective, steps):
    cls, options = REFERENCES[sampler]
    reference = cls(
        1000,
        0.00085,
        0.012,
        DIFFUSERS_NAME[name],
        prediction_type=DIFFUSERS_OBJECTIVE[objective],
        timestep_spacing=spacing,
        steps_offset=1,
        **options,
    )
    theirs = reference_walk(reference, start(), steps)
    ours = our_walk(sampler, name, objective, start(), steps, spacing)
    assert len(ours) == len(theirs) == steps
    # Cosine's alpha_999 is 5e-5. From there diffusers' Euler carries x / alpha in float32, and an eps output
    # is divided by alpha: both lose 4 digits.
    coarse = name == "cosine" and spacing != "leading" and (sampler == "euler" or objective == "eps")
    for our_x, their_x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_x, their_x, atol=5e-3 if coarse else 1e-5, rtol=1e-5)


def test_ddim_with_eta_matches_diffusers_noise_for_noise():
    reference = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, set_alpha_to_one=True, steps_offset=1
    )

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    theirs = reference_walk(reference, start(), 50, eta=0.7, generator=generators())
    ours = our_walk("ddim", "scaled_linear", "eps", start(), 50, "leading", eta=0.7, generators=generators())
    for our_x, their_x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_x, their_x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize(("spacing", "shift"), [("linspace", 1.0), ("trailing", 1.0), ("trailing", 3.0)])
def test_flow_euler_matches_diffusers(spacing, shift, steps):
    reference = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    # Without sigmas diffusers spaces as our "linspace", except that it shifts the last sigma twice.
    sigmas = np.linspace(1, 1 / steps, steps) if spacing == "trailing" else None
    reference.set_timesteps(steps, sigmas=sigmas)
    x = start()
    for t in reference.timesteps:
        x = reference.step(toy(x, t), t, x).prev_sample
    schedule = build_schedule(ScheduleConfig("flow", shift=shift))
    ours = sample(toy_denoise(schedule, "flow"), start(), schedule, "euler", steps, spacing=spacing)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_flow_dpmpp_2m_matches_diffusers():
    reference = DPMSolverMultistepScheduler(
        1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    reference.set_timesteps(20)
    x = start()
    for t, sigma in zip(reference.timesteps, reference.sigmas[:-1], strict=True):
        x = reference.step(toy(x, 1000 * sigma), t, x).prev_sample
    # Its grid starts at 0.999, as it cannot take the log of alpha = 0, and ours at 1: walk its grid.
    sigma = reference.sigmas.double()
    levels = NoiseLevels(sigma[:-1].tolist(), (1 - sigma).tolist(), sigma.tolist())
    denoise = toy_denoise(build_schedule(ScheduleConfig("flow")), "flow")
    solver, ours = SAMPLERS["dpmpp_2m"](levels), start()
    for i in range(20):
        ours = solver.step(denoise, ours, i)
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


# Gaussian data N(MEAN, STD^2): the best denoiser and the probability-flow path are known in closed form.
MEAN, STD = 0.7, 0.4


def marginal(alpha, sigma):
    """Mean and standard deviation of x_t."""
    return alpha * MEAN, (alpha**2 * STD**2 + sigma**2) ** 0.5


def best_prediction(x, alpha, sigma):
    mean, std = marginal(alpha, sigma)
    z = (x - mean) / std
    return Prediction(x0=MEAN + alpha * STD**2 / std * z, eps=sigma / std * z)


def transported(x, start_level, end_level):
    """The exact solution of the probability-flow ODE: it keeps the standardised x."""
    (mean, std), (end_mean, end_std) = marginal(*start_level), marginal(*end_level)
    return end_mean + end_std * (x - mean) / std


PATHS = {
    "variance_preserving": (lambda t: (math.cos(t), math.sin(t)), 1.5, 0.05),
    "flow": (lambda t: (1 - t, t), 0.95, 0.05),
}


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence(sampler, order, path):
    alpha_sigma, first, last = PATHS[path]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = transported(x, alpha_sigma(first), alpha_sigma(last))
    errors = []
    for steps in (40, 80, 160, 320):
        times = np.linspace(first, last, steps + 1).tolist()
        alpha, sigma = zip(*map(alpha_sigma, times), strict=True)
        solver = SAMPLERS[sampler](NoiseLevels(times[:-1], alpha, sigma))
        y = x
        for i in range(steps):
            y = solver.step(lambda x_t, t: best_prediction(x_t, *alpha_sigma(t[0].item())), y, i)
        errors.append((y - exact).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "flow"])
def test_whole_walks_end_on_the_exact_sample(sampler, name):
    schedule = build_schedule(ScheduleConfig(name))
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    asked = []

    def denoise(x, t):
        asked.append(t[:1])
        return best_prediction(x, *schedule.alpha_sigma(t))

    errors = []
    for steps in (10, 500):
        asked.clear()
        result = sample(denoise, noise, schedule, sampler, steps)
        exact = transported(noise, schedule.alpha_sigma(asked[0]), (1.0, 0.0))
        errors.append((result - exact).abs().max().item())
    # The last step, from the lowest training step to clean data, keeps its size.
    assert errors[1] < min(0.015, errors[0] / 10)


def test_ancestral_sampling_draws_from_the_data():
    for name in ("scaled_linear", "flow"):
        schedule = build_schedule(ScheduleConfig(name))
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 20_000, generator=g, dtype=torch.float64)
        result = sample(
            lambda x, t, s=schedule: best_prediction(x, *s.alpha_sigma(t)),
            noise,
            schedule,
            "ddim",
            900,
            eta=1.0,
            generators=[g],
        )
        assert result.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert result.std().item() == pytest.approx(STD, abs=0.01)
        assert abs((result * noise).mean() - result.mean() * noise.mean()) < 0.02  # the start is forgotten


def test_euler_is_ddim_on_another_grid():
    for name in ("scaled_linear", "flow"):
        schedule = build_schedule(ScheduleConfig(name))
        denoise = toy_denoise(schedule, "eps")
        ddim, euler = (
            sample(denoise, start(), schedule, s, 10, spacing="trailing") for s in ("ddim", "euler")
        )
        assert torch.equal(ddim, euler)


def test_a_picture_depends_on_its_generator_only():
    schedule = build_schedule(ScheduleConfig("linear"))

    def walk(noise, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(toy_denoise(schedule, "v"), noise, schedule, "ddim", 5, eta=1.0, generators=generators)

    both = walk(start(), (7, 8))
    torch.testing.assert_close(walk(start()[1:], (8,)), both[1:])
    assert not torch.allclose(walk(start()[1:], (9,)), both[1:])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("name", "objective"), [("flow", "flow"), ("flow", "eps"), ("flow", "x0"), ("cosine", "v")]
)
def test_one_call_and_one_report_per_step(sampler, name, objective):
    schedule = build_schedule(ScheduleConfig(name))
    inner, times, reports = toy_denoise(schedule, objective), [], []

    def denoise(x, t):
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        times.append(t[0].item())
        return inner(x, t)

    result = sample(denoise, start(), schedule, sampler, 4, lambda *report: reports.append(report))
    assert result.isfinite().all()
    assert result.dtype == torch.float32
    assert times == sorted(set(times), reverse=True)
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
