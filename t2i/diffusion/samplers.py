"""From noise to data, written in (alpha, sigma) so that every sampler serves every schedule.

Each is the published one: grid, start and end are what diffusers' class of that name does with the same
scheduler config, by default Stable Diffusion 1's, so that the same seed gives the same picture there and here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.config import DiffusionSampling, GridConfig
from t2i.diffusion.dpm_solver import DPMSolverPlusPlus2M, DPMSolverPlusPlus2MSDE, UniPC
from t2i.diffusion.levels import (
    CLEAN,
    Level,
    NoiseLevels,
    as_tensors,
    exponential_levels,
    first_level,
    karras_levels,
    levels_at,
)
from t2i.diffusion.objectives import Prediction, target, to_x0_eps
from t2i.diffusion.sampler import Constrain, Denoise, Sampler
from t2i.diffusion.schedules import DiscreteSchedule, Schedule, Spacing
from t2i.diffusion.variance import log_variance, posterior
from t2i.interfaces import SampleRequest
from t2i.nn.once import weights_unchanged


class DDIM(Sampler):
    """Song et al. 2010.02502, eq. 12.

    Their sigma_tau(eta) (eq. 16) is eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2) for any schedule.
    """

    spacing: ClassVar[Spacing] = "leading"
    by_stride = True
    whole_times = True
    eta: float = 0.0

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        return first_level(schedule) if grid.set_alpha_to_one is False else CLEAN

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        return self.walk(self.predict(denoise, x, i), x, i)

    def walk(self, p: Prediction, x: Tensor, i: int) -> Tensor:
        """x after step i, which `p` was predicted for."""
        (alpha, sigma), (alpha_next, sigma_next) = self.levels.level(i), self.levels.end(i)
        fresh = self.eta**2 * (1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)  # share of sigma'^2
        x = alpha_next * p.x0 + sigma_next * math.sqrt(1 - fresh) * p.eps
        added = sigma_next * math.sqrt(fresh)
        return x + added * self.noise_like(x) if added > 0 else x


class DDPM(DDIM):
    """Ho et al. 2006.11239, algorithm 2, on a subset of the times and with the posterior's variance: DDIM with
    eta = 1. Where the model says the variance of its steps, with that (2102.09672)."""

    by_stride = False
    eta = 1.0

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        return CLEAN

    def walk(self, p: Prediction, x: Tensor, i: int) -> Tensor:
        if p.variance_share is None:
            return super().walk(p, x, i)
        q = posterior(*self.levels.level(i), *self.levels.end(i))
        x = q.x0_weight * p.x0 + q.x_weight * x
        if q.variance > 0:
            x = x + (0.5 * log_variance(p.variance_share, q)).exp() * self.noise_like(x)
        return x


class Euler(DDIM):
    """Euler's method on the probability-flow ODE.

    Variance preserving, in EDM's variables (Karras et al. 2206.00364): z = x / alpha and s = sigma / alpha
    obey dz/ds = eps, so z' = z + (s' - s) eps = x0 + s' eps. Rectified flow: dx/dt = eps - x0, so
    x' = x + (t' - t)(eps - x0). Both are x' = alpha' x0 + sigma' eps, which is DDIM's step.
    """

    spacing = "linspace"
    karras = True
    by_stride = False
    whole_times = False

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        alpha, sigma = CLEAN if grid.final_sigmas_type == "zero" else first_level(schedule)
        return 1.0, sigma / alpha  # z, which diffusers takes for the picture

    def start(self, noise: Tensor, spacing: Spacing) -> Tensor:
        """z = s noise, so x = sigma noise; on "leading", whose first level is not the schedule's last, x = noise
        as diffusers has it."""
        return noise if spacing == "leading" else self.levels.sigma[0] * noise


class EulerAncestral(Euler):
    """k-diffusion's `sample_euler_ancestral`: Euler's step down to s_down, then noise up to s', with
    s_up^2 = s'^2 (s^2 - s'^2) / s^2. In these variables it is DDIM's step with eta = 1."""

    karras = False
    eta = 1.0

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        return CLEAN


class Heun(Euler):
    """Heun's method on the probability-flow ODE, second order from two denoiser calls per step (Karras et al.
    2206.00364, algorithm 1 without churn).

    With the corrector the slope is the mean of both ends: x' = Euler's x' + half the difference of the slopes
    times the step, in the variables that Euler names. First order where the walk ends on sigma' = 0, and where
    s is infinite.
    """

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        return CLEAN

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        p = self.predict(denoise, x, i)
        alpha, alpha_next = self.levels.alpha[i : i + 2]
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        x = alpha_next * p.x0 + sigma_next * p.eps
        straight = max(abs(a + s - 1) for a, s in ((alpha, sigma), (alpha_next, sigma_next))) < 1e-9
        if sigma_next == 0 or (alpha == 0 and not straight):
            return x
        q = self.predict(denoise, self.constrain(x, self.levels.level(i + 1)), i + 1)
        if straight:  # rectified flow
            return x + (sigma_next - sigma) / 2 * ((q.eps - q.x0) - (p.eps - p.x0))
        return x + (sigma_next - alpha_next * sigma / alpha) / 2 * (q.eps - p.eps)


class PNDM(Sampler):
    """Pseudo linear multistep (PLMS), Liu et al. 2202.09778, eq. 12 and 13, started as Stable Diffusion does
    with a corrected Euler step in place of Runge-Kutta ones: the walk is one step longer than its grid.

    What is extrapolated is the network's own output, whatever it predicts. A walk that starts after the first
    level counts from there as diffusers' does, and is not the same method: its second step goes from the level
    above.
    """

    spacing = "leading"
    by_stride = True
    whole_times = True

    # Adams-Bashforth, newest output first.
    WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(self, levels: NoiseLevels, generators: Sequence[torch.Generator] | None = None) -> None:
        super().__init__(levels, generators)
        self._outputs: list[Tensor] = []  # newest first
        self._first_x: Tensor | None = None
        self._steps_taken = 0

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        return CLEAN if grid.set_alpha_to_one else first_level(schedule)

    def num_steps(self) -> int:
        steps = super().num_steps()
        return steps if steps == 1 else steps + 1

    def grid_index(self, i: int) -> int:
        return i if i < 2 else i - 1  # the second level is asked twice

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        index = self.grid_index(i)
        p = self.predict(denoise, x, index)
        level, (alpha, sigma) = self.levels.level(index), self.levels.end(index)
        output = target(p.objective, p.x0, p.eps, *as_tensors(level, x))
        self._steps_taken += 1
        if self._steps_taken == 2:  # the first step once more, with the mean of the outputs at its two ends
            assert self._first_x is not None
            x, output = self._first_x, (output + self._outputs[0]) / 2
            level, (alpha, sigma) = self.levels.before(index), self.levels.level(index)
        else:
            if self._steps_taken == 1:
                self._first_x = x
            self._outputs = [output, *self._outputs[:3]]
            weights = self.WEIGHTS[len(self._outputs) - 1]
            output = sum((w * o for w, o in zip(weights, self._outputs, strict=True)), torch.zeros_like(x))
        p = to_x0_eps(p.objective, output, x, *as_tensors(level, x))
        return alpha * p.x0 + sigma * p.eps


# The names are those of `t2i.diffusion.config.SamplerName`.
SAMPLERS: dict[str, type[Sampler]] = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "pndm": PNDM,
    "euler": Euler,
    "euler_ancestral": EulerAncestral,
    "heun": Heun,
    "dpmpp_2m": DPMSolverPlusPlus2M,
    "dpmpp_2m_sde": DPMSolverPlusPlus2MSDE,
    "unipc": UniPC,
}


@weights_unchanged()
def sample(
    denoise: Denoise,
    noise: Tensor,
    schedule: Schedule,
    sampler: str,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    grid: GridConfig | None = None,
    generators: Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
    init: Tensor | None = None,
    strength: float = 1.0,
    constrain: Constrain | None = None,
) -> Tensor:
    """Walks from noise to a sample of the data. Whether gradients are recorded is the caller's choice.

    denoise: (x_t, t) -> Prediction; see `Denoise`
    noise: (B, ...) ~ N(0, I), float32 or float64; the walk keeps its dtype and device
    sampler: a name in SAMPLERS
    steps: levels of the grid. Samplers call the denoiser once per level; heun calls it twice and pndm once more
    progress: called with (steps done, steps) after every step
    grid: None for that of Stable Diffusion 1's scheduler config; generators: see `Sampler`; eta: of ddim
    init: (B, ...) data to start from in place of nothing (SDEdit, Meng et al. 2108.01073)
    strength: above 0, at most 1: how much of the walk is taken from `init`; int(steps * strength) levels
    constrain: (x, (alpha, sigma)) -> x with what is known of it in its place, after every step: inpainting. All of the
        walk then starts from noise, whatever `init` is
    Raises ConfigError for a sampler, spacing, strength or number of steps that is not to be had.
    """
    from_noise = init is None or (constrain is not None and strength == 1)
    share = 1.0 if from_noise else strength
    solver, spacing, first = beginning(schedule, sampler, steps, grid, eta, share, generators)
    levels = solver.levels
    if constrain is not None:
        solver.constrain = constrain
    if from_noise:
        x = solver.start(noise, spacing)
    else:
        assert init is not None
        start = solver.grid_index(first)
        x = levels.alpha[start] * init + levels.sigma[start] * noise
    total = solver.num_steps()
    for i in range(first, total):
        x = solver.step(denoise, x, i)
        if constrain is not None:
            x = constrain(x, CLEAN if i + 1 == total else levels.level(solver.grid_index(i + 1)))
        if progress is not None:
            progress(i + 1 - first, total - first)
    return x


def beginning(
    schedule: Schedule,
    sampler: str,
    steps: int,
    grid: GridConfig | None,
    eta: float,
    strength: float,
    generators: Sequence[torch.Generator] | None = None,
) -> tuple[Sampler, Spacing, int]:
    """What walks, how its grid is spaced, and the step that it begins with; see `sample`, which raises as this does."""
    check(sampler in SAMPLERS, "sampling.sampler", sampler, ", ".join(SAMPLERS))
    cls = SAMPLERS[sampler]
    grid = grid or GridConfig()
    spacing = grid.timestep_spacing or schedule.spacing or cls.spacing
    solver = cls(noise_levels(cls, schedule, steps, spacing, grid), generators)
    if eta > 0:
        check(cls is DDIM, "sampling.eta", eta, "0 but with ddim")
        assert isinstance(solver, DDIM)
        solver.eta = eta
    check(0 < strength <= 1, "strength", strength, "above 0, at most 1")
    first = steps - int(steps * strength)
    check(first < steps, "strength", strength, f"{1 / steps:.3g} or more with sampling.steps={steps}")
    return solver, spacing, first


def check_walk(request: SampleRequest, sampling: DiffusionSampling, schedule: Schedule) -> None:
    """Raises ConfigError where `sample` does for this request."""
    strength = 1.0 if request.image is None else request.strength
    beginning(schedule, sampling.sampler, sampling.steps, sampling, sampling.eta, strength)


def noise_levels(
    cls: type[Sampler], schedule: Schedule, steps: int, spacing: Spacing, grid: GridConfig
) -> NoiseLevels:
    """The levels of `steps` steps down to the sampler's end."""
    t = cls.times(schedule, steps, spacing, grid.steps_offset)
    alpha, sigma = schedule.alpha_sigma(t)
    end = cls.end_level(schedule, grid)
    at_t = below = above = None
    discrete = isinstance(schedule, DiscreteSchedule)
    for key in ("use_karras_sigmas", "use_exponential_sigmas"):
        used = getattr(grid, key)
        check(discrete or not used, f"sampling.{key}", used, "false with schedule.name=flow")
    if isinstance(schedule, DiscreteSchedule):
        if cls.by_stride:
            stride = schedule.num_train_steps // steps
            below = [end if time < 0 else level for time, level in levels_at(schedule, t - stride)]
            above = [level for _, level in levels_at(schedule, t + stride)]
        if cls.karras and (grid.use_karras_sigmas or grid.use_exponential_sigmas):
            ends = cls.karras_ends(schedule, sigma / alpha)
            level = (karras_levels if grid.use_karras_sigmas else exponential_levels)(*ends, steps)
            t = schedule.time_of(level)
            t = t.round() if cls.whole_times else t
            at_t = [each for _, each in levels_at(schedule, t)]
            alpha, sigma = (1 + level**2).rsqrt(), (1 + level**-2).rsqrt()
    return NoiseLevels(t.tolist(), [*alpha.tolist(), end[0]], [*sigma.tolist(), end[1]], at_t, below, above)
