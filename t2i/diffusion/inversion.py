"""DDIM backwards: the noise from which a given sample of the data is drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.config import GridConfig
from t2i.diffusion.levels import as_tensors, first_level
from t2i.diffusion.objectives import target, to_x0_eps
from t2i.diffusion.sampler import Denoise
from t2i.diffusion.samplers import SAMPLERS, noise_levels
from t2i.diffusion.schedules import Schedule
from t2i.nn.once import weights_unchanged


@weights_unchanged()
def invert(
    denoise: Denoise,
    x0: Tensor,
    schedule: Schedule,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
    grid: GridConfig | None = None,
) -> Tensor:
    """The noise from which ddim without added noise draws x0 in so many steps, up to an error of first order in the
    step (2010.02502, section 4.3): each step goes up by what the network says of its lower end at the time of its
    upper one, as Dhariwal & Nichol (2105.05233, appendix F) and diffusers' DDIMInverseScheduler do.

    denoise, grid, progress: as `t2i.diffusion.samplers.sample` takes them; x0: (B, ...) -> the same shape
    Raises ConfigError where an x0 output says nothing of the noise, as the walk ends on clean data.
    """
    grid = grid or GridConfig()
    sampler = SAMPLERS["ddim"]
    spacing = grid.timestep_spacing or schedule.spacing or sampler.spacing
    levels = noise_levels(sampler, schedule, steps, spacing, grid)
    x, dtype = x0, torch.promote_types(x0.dtype, torch.float32)
    for i in reversed(range(steps)):
        p = denoise(x, torch.full((len(x),), levels.t[i], dtype=dtype, device=x.device))
        alpha, sigma = levels.level(i)
        output = target(p.objective, p.x0, p.eps, *as_tensors((alpha, sigma), x))
        lower = levels.end(i)
        if p.objective == "x0" and lower[1] == 0:
            lower = first_level(schedule)
            allowed = "a schedule with noise at its first step, where the network puts out x0"
            check(lower[1] > 0, "schedule", "without noise at its first step", allowed)
        p = to_x0_eps(p.objective, output, x, *as_tensors(lower, x))
        x = alpha * p.x0 + sigma * p.eps
        if progress is not None:
            progress(steps - i, steps)
    return x
