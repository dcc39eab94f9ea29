"""Samplers against diffusers, step for step, and against the exact solution for Gaussian data."""

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from diffusion_walks import (
    DIFFUSERS_NAME,
    DIFFUSERS_OBJECTIVE,
    EDM_VARIABLES,
    REFERENCES,
    STOCHASTIC,
    assert_same_walk,
    our_walk,
    reference_walk,
    start,
    tolerance,
    toy,
    toy_denoise,
)
from schedule_configs import schedule_config

from t2i.diffusion.config import DiffusionSampling, GridConfig, SamplerName
from t2i.diffusion.objectives import Prediction
from t2i.diffusion.samplers import SAMPLERS, NoiseLevels, check_walk, sample
from t2i.diffusion.schedules import build_schedule
from t2i.errors import ConfigError
from t2i.interfaces import SampleRequest

pytestmark = pytest.mark.usefixtures("float64")


def test_the_names_are_those_of_the_configuration():
    assert tuple(SAMPLERS) == get_args(SamplerName) == tuple(REFERENCES)


# Two of diffusers' classes know no x0.
WITHOUT_X0 = ("pndm", "euler_ancestral")
COMBINATIONS = [(s, o) for s in SAMPLERS for o in ("eps", "v", "x0") if o != "x0" or s not in WITHOUT_X0]


# Not one step on "linspace": diffusers then starts at the clean end.
@pytest.mark.parametrize(
    ("sampler", "objective", "steps"),
    [(s, o, n) for s, o in COMBINATIONS for n in (1, 2, 10, 50) if n > 1 or s not in EDM_VARIABLES],
)
def test_every_step_of_the_published_config_matches_diffusers(sampler, objective, steps):
    theirs = reference_walk(sampler, start(), steps, (3, 4), prediction_type=DIFFUSERS_OBJECTIVE[objective])
    ours = our_walk(sampler, "scaled_linear", objective, start(), steps, seeds=(3, 4))
    assert_same_walk(ours, theirs, tolerance(sampler, objective))


@pytest.mark.parametrize(("sampler", "objective"), COMBINATIONS)
@pytest.mark.parametrize("strength", [0.1, 0.15, 0.2, 0.75, 1.0])
def test_walks_from_a_picture_match_diffusers(sampler, objective, strength):
    init = torch.tanh(start().flip(0))
    their_options = {"init": init, "strength": strength, "prediction_type": DIFFUSERS_OBJECTIVE[objective]}
    theirs = reference_walk(sampler, start(), 20, (3, 4), **their_options)
    options = {"seeds": (3, 4), "init": init, "strength": strength}
    ours = our_walk(sampler, "scaled_linear", objective, start(), 20, **options)
    assert_same_walk(ours, theirs, tolerance(sampler, objective))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("objective", ["eps", "v"])
def test_ddim_that_adds_noise_matches_diffusers(eta, objective):
    theirs = reference_walk(
        "ddim", start(), 20, (3, 4), eta=eta, prediction_type=DIFFUSERS_OBJECTIVE[objective]
    )
    ours = our_walk("ddim", "scaled_linear", objective, start(), 20, seeds=(3, 4), eta=eta)
    assert_same_walk(ours, theirs, tolerance("ddim", objective))
    with pytest.raises(ConfigError, match=r"eta is 0\.5; allowed: 0 but with ddim"):
        our_walk("ddpm", "scaled_linear", objective, start(), 20, seeds=(3, 4), eta=0.5)


# Where alpha is 0 here, it is 2^-12 in two of diffusers' classes.
@pytest.mark.parametrize(
    ("sampler", "objective", "atol"),
    [
        ("ddim", "v", 1e-5),
        ("ddim", "x0", 1e-4),
        ("ddpm", "v", 1e-5),
        ("ddpm", "x0", 1e-4),
        ("euler", "v", 2e-3),
        ("dpmpp_2m", "v", 2e-3),
    ],
)
def test_zero_terminal_snr_matches_diffusers(sampler, objective, atol):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = reference_walk(
        sampler, start(), 20, (3, 4), prediction_type=DIFFUSERS_OBJECTIVE[objective], **changes
    )
    ours = our_walk(sampler, "scaled_linear", objective, start(), 20, seeds=(3, 4), zero_terminal_snr=True)
    assert_same_walk(ours, theirs, atol)


GRIDS = [
    (sampler, spacing, name, objective)
    for sampler, objective in COMBINATIONS
    for spacing in ("leading", "linspace", "trailing")
    for name in DIFFUSERS_NAME
    # Cosine's sigma / alpha begins at 20,000, where Heun's corrector makes rounding errors 1,500 times larger.
    if not (sampler == "heun" and name == "cosine" and spacing != "leading")
    # There diffusers' PNDM multiplies by 1 / alpha = 20,000 and takes about as much off again.
    if not (sampler == "pndm" and name == "cosine" and spacing != "leading")
]


@pytest.mark.parametrize(("sampler", "spacing", "name", "objective"), GRIDS)
@pytest.mark.parametrize("steps", [10, 30])
def test_every_step_on_every_grid_matches_diffusers(sampler, spacing, name, objective, steps):
    changes = {"beta_schedule": DIFFUSERS_NAME[name], "timestep_spacing": spacing}
    if objective == "x0" and sampler in WITHOUT_X0:
        pytest.skip(f"diffusers' {sampler} knows no x0")
    theirs = reference_walk(
        sampler, start(), steps, (3, 4), prediction_type=DIFFUSERS_OBJECTIVE[objective], **changes
    )
    grid = GridConfig(timestep_spacing=spacing)
    ours = our_walk(sampler, name, objective, start(), steps, grid, seeds=(3, 4))
    # Cosine's alpha_999 is 5e-5. From there diffusers' Euler carries x / alpha in float32, and an eps output
    # is divided by alpha: both lose 4 digits.
    coarse = name == "cosine" and spacing != "leading" and (sampler in EDM_VARIABLES or objective == "eps")
    assert_same_walk(ours, theirs, 5e-3 if coarse else tolerance(sampler, objective))


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
    schedule = build_schedule(schedule_config("flow", shift=shift))
    ours = sample(
        toy_denoise(schedule, "flow"),
        start(),
        schedule,
        "euler",
        steps,
        grid=GridConfig(timestep_spacing=spacing),
    )
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_flow_heun_matches_diffusers():
    reference = FlowMatchHeunDiscreteScheduler(1000)
    reference.set_timesteps(10)
    x = start()
    for t in reference.timesteps:
        x = reference.step(toy(x, t), t, x).prev_sample
    schedule = build_schedule(schedule_config("flow"))
    ours = sample(
        toy_denoise(schedule, "flow"),
        start(),
        schedule,
        "heun",
        10,
        grid=GridConfig(timestep_spacing="linspace"),
    )
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
    denoise = toy_denoise(build_schedule(schedule_config("flow")), "flow")
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


DETERMINISTIC = [name for name in SAMPLERS if name not in STOCHASTIC]
PATHS = {
    "variance_preserving": (lambda t: (math.cos(t), math.sin(t)), 1.5, 0.05),
    "flow": (lambda t: (1 - t, t), 0.95, 0.05),
}


@pytest.mark.parametrize(
    ("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("pndm", 2), ("dpmpp_2m", 2), ("unipc", 3)]
)
@pytest.mark.parametrize("path", PATHS)
def test_order_of_convergence(sampler, order, path, monkeypatch):
    # UniPC's published last step is of first order.
    monkeypatch.setattr(SAMPLERS["unipc"], "first_order_end_below", 0)
    alpha_sigma, first, last = PATHS[path]
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = transported(x, alpha_sigma(first), alpha_sigma(last))
    errors = []
    for steps in (40, 80, 160, 320):
        times = np.linspace(first, last, steps + 1).tolist()
        alpha, sigma = zip(*map(alpha_sigma, times), strict=True)
        solver = SAMPLERS[sampler](NoiseLevels(times, alpha, sigma))
        y = x
        for i in range(solver.num_steps()):
            y = solver.step(lambda x_t, t: best_prediction(x_t, *alpha_sigma(t[0].item())), y, i)
        errors.append((y - exact).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "flow"])
def test_whole_walks_end_on_the_exact_sample(sampler, name):
    schedule = build_schedule(schedule_config(name))
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


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral"])
def test_ancestral_sampling_draws_from_the_data(sampler):
    for name in ("scaled_linear", "flow"):
        schedule = build_schedule(schedule_config(name))
        g = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 20_000, generator=g, dtype=torch.float64)
        result = sample(
            lambda x, t, s=schedule: best_prediction(x, *s.alpha_sigma(t)),
            noise,
            schedule,
            sampler,
            900,
            generators=[g],
        )
        assert result.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert result.std().item() == pytest.approx(STD, abs=0.01)
        assert abs((result * noise).mean() - result.mean() * noise.mean()) < 0.02  # the start is forgotten


def test_on_a_flow_schedule_euler_is_ddim():
    schedule = build_schedule(schedule_config("flow"))
    denoise = toy_denoise(schedule, "eps")
    ddim, euler = (sample(denoise, start(), schedule, s, 10) for s in ("ddim", "euler"))
    assert torch.equal(ddim, euler)


def test_a_picture_depends_on_its_generator_only():
    schedule = build_schedule(schedule_config("linear"))

    def walk(noise, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(toy_denoise(schedule, "v"), noise, schedule, "ddpm", 5, generators=generators)

    both = walk(start(), (7, 8))
    torch.testing.assert_close(walk(start()[1:], (8,)), both[1:])
    assert not torch.allclose(walk(start()[1:], (9,)), both[1:])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("name", "objective"), [("flow", "flow"), ("flow", "eps"), ("flow", "x0"), ("cosine", "v")]
)
def test_calls_and_reports(sampler, name, objective):
    schedule = build_schedule(schedule_config(name))
    inner, times, reports = toy_denoise(schedule, objective), [], []

    def denoise(x, t):
        assert t.shape == (2,)
        assert t.dtype == torch.float32
        times.append(t[0].item())
        return inner(x, t)

    result = sample(denoise, start(), schedule, sampler, 4, lambda *report: reports.append(report))
    assert result.isfinite().all()
    assert result.dtype == torch.float32
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == 4
    assert len(times) == {"heun": 7, "pndm": 5}.get(sampler, 4)
    steps = 5 if sampler == "pndm" else 4
    assert reports == [(i + 1, steps) for i in range(steps)]


@pytest.mark.parametrize(
    ("changes", "strength", "name"),
    [
        ({"steps": 1001}, None, "scaled_linear"),
        ({"steps": 1000, "sampler": "dpmpp_2m", "timestep_spacing": "leading"}, None, "scaled_linear"),
        ({"steps": 4}, 0.2, "scaled_linear"),
        ({"steps_offset": 999, "timestep_spacing": "leading"}, None, "scaled_linear"),
        ({"timestep_spacing": "leading"}, None, "flow"),
        ({"use_karras_sigmas": True}, None, "flow"),
    ],
)
def test_what_cannot_be_walked_is_known_before(changes, strength, name):
    schedule = build_schedule(schedule_config(name))
    options = DiffusionSampling(**{"sampler": "euler", "steps": 10, "guidance_scale": 1.0} | changes)
    init = None if strength is None else torch.zeros(1, 3, 8, 8)
    request = SampleRequest(["x"], [0], 8, 8, image=init, strength=strength or 1.0)
    with pytest.raises(ConfigError) as known:
        check_walk(request, options, schedule)
    with pytest.raises(ConfigError) as found:
        sample(
            None,
            torch.zeros(1, 3, 8, 8),
            schedule,
            options.sampler,
            options.steps,
            grid=options,
            init=init,
            strength=request.strength,
        )
    assert str(known.value) == str(found.value)
