"""One walk of a sampler in diffusers and here, with all that its network was asked."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from schedule_configs import schedule_config

from t2i.diffusion.objectives import to_x0_eps
from t2i.diffusion.samplers import sample
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


# Stable Diffusion 1's scheduler_config.json, as published with PNDMScheduler.
SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
REFERENCES = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
THEIR_OPTIONS = {"dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}}
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde")
EDM_VARIABLES = ("euler", "euler_ancestral", "heun")  # diffusers walks x / alpha


def reference_walk(sampler, noise, steps, seeds=None, init=None, strength=1.0, eta=0.0, **changes):
    """The loop of diffusers' pipelines: what its network was asked, and the result."""
    reference = REFERENCES[sampler].from_config(
        PNDMScheduler.from_config(SD1).config, **THEIR_OPTIONS.get(sampler, {}), **changes
    )
    reference.set_timesteps(steps)
    if sampler == "unipc":  # its equations are in torch's default dtype, which is float64 here
        reference.sigmas = reference.sigmas.double()
    times = reference.timesteps
    if init is None:
        x = noise * reference.init_noise_sigma
    else:
        first = max(steps - min(int(steps * strength), steps), 0) * reference.order
        times = times[first:]
        if hasattr(reference, "set_begin_index"):
            reference.set_begin_index(first)
        x = reference.add_noise(init, noise, times[:1].repeat(len(init)))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]
    options = {"generator": generators} if sampler in STOCHASTIC or eta > 0 else {}
    if eta > 0:
        options["eta"] = eta
    states = []
    for t in times:
        asked = reference.scale_model_input(x, t)
        states.append(asked)
        x = reference.step(toy(asked, t.to(x.dtype)), t, x, **options).prev_sample
    return [*states, x]


def our_walk(sampler, name, objective, noise, steps, grid=None, seeds=(), zero_terminal_snr=False, **options):
    schedule = build_schedule(schedule_config(name, zero_terminal_snr=zero_terminal_snr))
    states = []
    inner = toy_denoise(schedule, objective)

    def denoise(x, t):
        states.append(x)
        return inner(x, t)

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = {"generators": generators, **options}
    states.append(sample(denoise, noise, schedule, sampler, steps, grid=grid, **options))
    return states


def assert_same_walk(ours, theirs, atol):
    assert len(ours) == len(theirs)
    for our_x, their_x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our_x, their_x, atol=atol, rtol=1e-5)


def tolerance(sampler, objective):
    """An x0 output's eps is divided by sigma, which is 0.03 where walks end; Heun's corrector adds to that."""
    if objective != "x0":
        return 1e-5
    return 2e-3 if sampler == "heun" else 1e-4
