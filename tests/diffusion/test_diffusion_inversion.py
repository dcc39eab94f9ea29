"""DDIM backwards: against diffusers, and against the exact path of Gaussian data."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler, PNDMScheduler
from diffusion_walks import DIFFUSERS_OBJECTIVE, SD1, start, toy, toy_denoise
from schedule_configs import schedule_config

from t2i.diffusion.config import GridConfig
from t2i.diffusion.inversion import invert
from t2i.diffusion.objectives import Prediction
from t2i.diffusion.samplers import sample
from t2i.diffusion.schedules import build_schedule
from t2i.errors import ConfigError

pytestmark = pytest.mark.usefixtures("float64")


# Where the walk ends on clean data, diffusers divides an x0 output's noise by zero.
@pytest.mark.parametrize(
    ("objective", "to_one"), [("eps", False), ("v", False), ("x0", False), ("eps", True), ("v", True)]
)
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_every_step_is_that_of_diffusers(objective: str, steps: int, to_one: bool) -> None:
    reference = DDIMInverseScheduler.from_config(
        PNDMScheduler.from_config(SD1).config,
        prediction_type=DIFFUSERS_OBJECTIVE[objective],
        set_alpha_to_one=to_one,
    )
    reference.set_timesteps(steps)
    x = start()
    for t in reference.timesteps:
        x = reference.step(toy(x, t.to(x.dtype)), t, x).prev_sample
    schedule = build_schedule(schedule_config("scaled_linear"))
    grid = GridConfig(set_alpha_to_one=to_one)
    seen: list[tuple[int, int]] = []
    found = invert(
        toy_denoise(schedule, objective),
        start(),
        schedule,
        steps,
        lambda done, total: seen.append((done, total)),
        grid,
    )
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-4 if objective == "x0" else 1e-5)
    assert seen == [(i, steps) for i in range(1, steps + 1)]


MEAN, STD = 0.7, 0.4  # of the data


@pytest.mark.parametrize("name", ["scaled_linear", "cosine", "flow"])
def test_the_way_there_and_back_has_an_error_of_first_order(name: str) -> None:
    schedule = build_schedule(schedule_config(name))

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t[:1])
        std = (alpha**2 * STD**2 + sigma**2).sqrt()
        z = (x - alpha * MEAN) / std
        objective = "flow" if name == "flow" else "v"
        return Prediction(MEAN + alpha * STD**2 / std * z, sigma / std * z, objective)  # type: ignore[arg-type]

    x0 = MEAN + STD * torch.linspace(-2, 2, 9)
    errors = []
    grid = GridConfig(timestep_spacing="trailing")
    for steps in (25, 50, 100, 200):
        noise = invert(denoise, x0, schedule, steps, grid=grid)
        back = sample(denoise, noise, schedule, "ddim", steps, grid=grid)
        errors.append((back - x0).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert errors[-1] < 0.03
    assert orders[-1] == pytest.approx(1, abs=0.2), errors


def test_an_x0_output_on_a_schedule_that_begins_clean_is_refused() -> None:
    schedule = build_schedule(schedule_config("flow"))
    with pytest.raises(ConfigError, match="schedule is 'without noise at its first step'"):
        invert(toy_denoise(schedule, "x0"), start(), schedule, 4)
