"""Where samplers ask and end, as a scheduler's configuration says it, against diffusers step for step."""

import pytest
from diffusion_walks import (
    DIFFUSERS_OBJECTIVE,
    assert_same_walk,
    our_walk,
    reference_walk,
    start,
    toy_denoise,
)
from schedule_configs import schedule_config

from t2i.diffusion.config import GridConfig
from t2i.diffusion.samplers import SAMPLERS, sample
from t2i.diffusion.schedules import build_schedule
from t2i.errors import ConfigError

pytestmark = pytest.mark.usefixtures("float64")

# What a scheduler's configuration may say, beyond the spacing alone.
SETTINGS = [
    {"timestep_spacing": "leading", "steps_offset": 0},
    {"timestep_spacing": "leading", "steps_offset": 3, "set_alpha_to_one": True},
    {"timestep_spacing": "trailing", "set_alpha_to_one": True, "final_sigmas_type": "sigma_min"},
    {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "timestep_spacing": "leading", "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
    {"use_exponential_sigmas": True},
    {"use_exponential_sigmas": True, "timestep_spacing": "leading", "final_sigmas_type": "sigma_min"},
]


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (sampler, settings)
        for sampler in SAMPLERS
        for settings in SETTINGS
        # Of those, diffusers cuts the first time, 998.9999, to 998.
        if not ("use_exponential_sigmas" in settings and sampler.startswith(("dpmpp", "unipc")))
    ],
    ids=str,
)
def test_every_setting_of_a_scheduler_means_what_it_means_in_diffusers(sampler, settings, objective, steps):
    """`from_config` gives each class those that it knows, and it passes over the others."""
    theirs = reference_walk(
        sampler, start(), steps, (3, 4), prediction_type=DIFFUSERS_OBJECTIVE[objective], **settings
    )
    grid = GridConfig(**settings)
    ours = our_walk(sampler, "scaled_linear", objective, start(), steps, seeds=(3, 4), grid=grid)
    assert_same_walk(ours, theirs, 5e-5)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_such_levels_need_an_end_with_signal(key):
    schedule, grid = (
        build_schedule(schedule_config("scaled_linear", zero_terminal_snr=True)),
        GridConfig(**{key: True}),
    )
    with pytest.raises(ConfigError, match=f"{key} is True; allowed: false on a schedule that ends"):
        sample(toy_denoise(schedule, "v"), start(), schedule, "euler", 5, grid=grid)
    flow = build_schedule(schedule_config("flow"))
    with pytest.raises(ConfigError, match=rf"{key} is True; allowed: false with schedule\.name=flow"):
        sample(toy_denoise(flow, "flow"), start(), flow, "euler", 5, grid=grid)
