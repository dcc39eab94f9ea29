import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_configs import needed, schedule_config

from t2i.config import parse
from t2i.diffusion.config import GridConfig, ScheduleConfig
from t2i.diffusion.objectives import Prediction
from t2i.diffusion.samplers import sample
from t2i.diffusion.schedules import DiscreteSchedule, FlowSchedule, betas, build_schedule
from t2i.errors import ConfigError

pytestmark = pytest.mark.usefixtures("float64")

deterministic = settings(derandomize=True, deadline=None)

DIFFUSERS_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def discrete(name: str = "scaled_linear") -> DiscreteSchedule:
    schedule = build_schedule(schedule_config(name))
    assert isinstance(schedule, DiscreteSchedule)
    return schedule


@pytest.mark.parametrize("name", DIFFUSERS_NAME)
def test_betas_and_add_noise_match_diffusers(name):
    reference = DDPMScheduler(1000, 0.00085, 0.012, DIFFUSERS_NAME[name])
    torch.testing.assert_close(
        betas(name, 1000, 0.00085, 0.012), reference.betas.double(), atol=1e-7, rtol=1e-5
    )
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 3, 4, 4, generator=g)
    t = torch.randint(1000, (64,), generator=g)
    t[:2] = torch.tensor([0, 999])
    torch.testing.assert_close(
        discrete(name).add_noise(x0, eps, t), reference.add_noise(x0, eps, t), atol=1e-5, rtol=0
    )


def test_scaled_linear_is_linear_in_the_square_root():
    root = betas("scaled_linear", 10, 0.01, 0.04).sqrt()
    assert root[0] == pytest.approx(0.1)
    assert root[-1] == pytest.approx(0.2)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(9))


@pytest.mark.parametrize("name", DIFFUSERS_NAME)
def test_discrete_schedules_preserve_variance_and_lose_signal(name):
    schedule = discrete(name)
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float32))
    torch.testing.assert_close(alpha.double() ** 2, schedule.alphas_cumprod, atol=1e-7, rtol=1e-5)
    assert (schedule.snr(torch.arange(1000)).diff() < 0).all()


@deterministic
@given(t=st.floats(0, 999))
def test_fractional_times_interpolate_the_noise_level_linearly(t):
    schedule = discrete()
    level = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    low = min(int(t), 998)
    expected = level[low] * (low + 1 - t) + level[low + 1] * (t - low)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64))
    torch.testing.assert_close(sigma / alpha, expected[None])
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1, dtype=torch.float64))


def test_whole_times_are_the_same_as_integers_and_as_floats():
    whole = discrete().alpha_sigma(torch.arange(1000))
    floating = discrete().alpha_sigma(torch.arange(1000).float())
    assert torch.equal(whole[0], floating[0])
    assert torch.equal(whole[1], floating[1])


@deterministic
@given(t=st.floats(0, 1), shift=st.floats(0.1, 10))
def test_flow_is_a_straight_line_whatever_the_shift(t, shift):
    x0, eps = torch.tensor([[[2.0, -1.0]]]), torch.tensor([[[0.5, 3.0]]])
    x_t = FlowSchedule(shift=shift).add_noise(x0, eps, torch.tensor([t]))
    torch.testing.assert_close(x_t, x0 + t * (eps - x0))


def test_flow_snr_runs_from_infinity_to_zero():
    snr = FlowSchedule().snr(torch.tensor([0.0, 0.5, 1.0]))
    assert snr.tolist() == [math.inf, 1.0, 0.0]


def test_model_time_runs_up_to_the_number_of_train_steps():
    discrete_time = discrete().model_time(torch.tensor([0, 999]))
    flow_time = FlowSchedule().model_time(torch.tensor([0.0, 0.25, 1.0]))
    assert discrete_time.is_floating_point()
    assert discrete_time.tolist() == [0, 999]
    assert flow_time.tolist() == [0, 250, 1000]


@pytest.mark.parametrize("config", [schedule_config("linear"), schedule_config("flow")], ids=lambda c: c.name)
def test_training_times_are_uniform(config):
    schedule = build_schedule(config)
    t = schedule.training_times(torch.rand(50_000, generator=torch.Generator().manual_seed(1)))
    share = t.double() / (999 if config.name == "linear" else 1)
    assert 0 <= share.min() < 0.001
    assert 0.999 < share.max() <= 1
    deciles = torch.quantile(share, torch.arange(1, 10).double() / 10)
    torch.testing.assert_close(deciles, torch.arange(1, 10).double() / 10, atol=0.01, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_times_are_normal_in_the_logit(shift):
    schedule = FlowSchedule(shift=shift, time_distribution="logit_normal")
    logit = torch.logit(
        schedule.training_times(torch.rand(50_000, generator=torch.Generator().manual_seed(2))).double()
    )
    # The shift multiplies t / (1 - t), so it adds log(shift) to the logit.
    assert logit.mean().item() == pytest.approx(math.log(shift), abs=0.02)
    assert logit.std().item() == pytest.approx(1, abs=0.02)


@deterministic
@given(steps=st.integers(1, 999), spacing=st.sampled_from(["leading", "linspace", "trailing"]))
def test_discrete_times_decrease_within_the_schedule(steps, spacing):
    t = discrete().times(steps, spacing)
    assert t.shape == (steps,)
    assert (t.diff() < 0).all()
    assert t.min() >= 0
    assert t.max() <= 999
    if spacing != "leading":
        assert t[0] == 999


def test_flow_times_take_the_shift_once():
    t = torch.tensor([1, 0.75, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(FlowSchedule(shift=3).times(4, "trailing"), 3 * t / (1 + 2 * t))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "sigmoid"}, "schedule.name is 'sigmoid'"),
        ({"name": "linear", "num_train_steps": 1}, "schedule.num_train_steps is 1"),
        ({"name": "linear", "beta_start": 0.0}, "schedule.beta_start is 0.0"),
        ({"name": "linear", "beta_start": 0.02, "beta_end": 0.01}, "schedule.beta_end is 0.01"),
        ({"name": "linear", "beta_end": 1.0}, "schedule.beta_end is 1.0"),
        ({"name": "flow", "shift": 0.0}, "schedule.shift is 0.0"),
        ({"name": "linear", "shift": 3.0}, "schedule.shift is 3.0; allowed: null with"),
        ({"name": "cosine", "beta_start": 0.1}, "schedule.beta_start is 0.1; allowed: null with"),
        ({"name": "flow", "beta_end": 0.1}, "schedule.beta_end is 0.1; allowed: null with"),
        ({"name": "flow", "shift": None}, "schedule.shift is None; allowed: above 0 with"),
        ({"name": "scaled_linear", "beta_end": None}, "schedule.beta_end is None"),
        ({"name": "flow", "time_distribution": "normal"}, "schedule.time_distribution is 'normal'"),
        ({"name": "cosine", "time_distribution": "logit_normal"}, "allowed: uniform with"),
    ],
)
def test_config_refuses(values, said):
    with pytest.raises(ConfigError, match=said):
        schedule_config(**values)
    with pytest.raises(ConfigError, match=said):
        parse(ScheduleConfig, needed(values["name"]) | values, "schedule.")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "flow"])
def test_what_older_runs_say_of_a_schedule_is_read(name):
    """Each had the values of the others too."""
    older = {"name": name, "beta_start": 0.00085, "beta_end": 0.012, "shift": 1.0, "zero_terminal_snr": False}
    assert parse(ScheduleConfig, older) == schedule_config(name)


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        ("linear", {"sampler": "plms"}, "sampling.sampler is 'plms'; allowed: ddim, ddpm, pndm, euler"),
        ("linear", {"steps": 0}, "sampling.steps is 0; allowed: 1 to 999 with the leading spacing"),
        ("linear", {"steps": 1000}, "sampling.steps is 1000; allowed: 1 to 999"),
        (
            "linear",
            {"steps": 1001, "grid": GridConfig(timestep_spacing="trailing")},
            "sampling.steps is 1001; allowed: 1 to 1000",
        ),
        (
            "linear",
            {"steps": 0, "sampler": "dpmpp_2m"},
            "sampling.steps is 0; allowed: 1 to 999 for dpmpp_2m",
        ),
        (
            "linear",
            {"steps": 1000, "sampler": "dpmpp_2m"},
            "sampling.steps is 1000; allowed: 1 to 999 for dpmpp_2m",
        ),
        (
            "linear",
            {"steps": 999, "sampler": "dpmpp_2m", "grid": GridConfig(timestep_spacing="leading")},
            "allowed: 1 to 998",
        ),
        (
            "linear",
            {"grid": GridConfig(timestep_spacing="karras")},
            "sampling.timestep_spacing is 'karras'; allowed: leading, linspace, trailing",
        ),
        (
            "linear",
            {"init": torch.zeros(1, 2), "strength": 0.0},
            "strength is 0.0; allowed: above 0, at most 1",
        ),
        ("linear", {"init": torch.zeros(1, 2), "strength": 1.1}, "strength is 1.1; allowed"),
        (
            "linear",
            {"init": torch.zeros(1, 2), "strength": 0.09},
            "allowed: 0.1 or more with sampling.steps=10",
        ),
        (
            "flow",
            {"grid": GridConfig(timestep_spacing="leading")},
            "sampling.timestep_spacing is 'leading'; allowed: trailing, linspace",
        ),
        ("flow", {"steps": 0}, "sampling.steps is 0; allowed: 1 or more"),
    ],
)
def test_sample_refuses(schedule, options, said):
    options = {"sampler": "ddim", "steps": 10} | options
    with pytest.raises(ConfigError, match=said):
        sample(
            lambda x, t: Prediction(x, x),
            torch.zeros(1, 2),
            build_schedule(schedule_config(schedule)),
            **options,
        )


@settings(deterministic, max_examples=30)
@given(steps=st.integers(1, 998))
def test_every_allowed_number_of_steps_works_for_every_sampler(steps):
    schedule = discrete()
    for sampler, spacing in [("dpmpp_2m", "leading"), ("dpmpp_2m", "linspace"), ("ddim", "leading")]:
        asked: list[float] = []

        def denoise(x, t, asked=asked):
            asked.append(t.item())
            return Prediction(x, x)

        sample(
            denoise, torch.zeros(1, 1), schedule, sampler, steps, grid=GridConfig(timestep_spacing=spacing)
        )
        assert len(set(asked)) == steps
        assert all(t == round(t) and 0 <= t <= 999 for t in asked)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_matches_diffusers(name):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    config = schedule_config(name, zero_terminal_snr=True)
    plain = betas(name, 1000, config.beta_start, config.beta_end)
    schedule, before = build_schedule(config), DiscreteSchedule(plain)
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(plain), dim=0)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(schedule.alphas_cumprod[0], before.alphas_cumprod[0], atol=0, rtol=1e-12)
    for t in (torch.tensor([999]), torch.tensor([999.0]), torch.tensor([999.0], dtype=torch.float64)):
        alpha, sigma = schedule.alpha_sigma(t)
        assert (alpha.item(), sigma.item()) == (0, 1)
        assert schedule.snr(t).item() == 0
    times = torch.arange(1000)
    for schedule_times in (times, times.double()):
        alpha, sigma = schedule.alpha_sigma(schedule_times)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
        torch.testing.assert_close(alpha.double() ** 2, expected, atol=1e-6, rtol=1e-6)
    assert schedule.spacing == "trailing"
    assert schedule.times(10, "trailing")[0] == 999


def test_pure_noise_is_where_flow_begins_anyway():
    with pytest.raises(ConfigError, match="zero_terminal_snr is True; allowed: false"):
        schedule_config("flow", zero_terminal_snr=True)
