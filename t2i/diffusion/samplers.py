"""From noise to data: solvers of the probability-flow ODE, written in (alpha, sigma) so that they serve every
schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.objectives import Prediction
from t2i.diffusion.schedules import DiscreteSchedule, Schedule, Spacing

# denoise(x_t, t) with x_t: (B, ...) and t: (B,) floating point, in the schedule's own time.
Denoise = Callable[[Tensor, Tensor], Prediction]


@dataclass(frozen=True)
class NoiseLevels:
    """The grid a sampler walks down. Host numbers: no step waits for the device.

    t: where the denoiser is asked; `steps` values
    alpha, sigma: at those times, and last where the walk ends; `steps` + 1 values
    """

    t: Sequence[float]
    alpha: Sequence[float]
    sigma: Sequence[float]


class Sampler(ABC):
    """One walk down the noise levels; a sampler of its own for every walk, as some remember past steps.

    spacing: the time grid on discrete schedules, what diffusers' class of this sampler does with Stable
        Diffusion 1's published scheduler config
    stochastic: whether eta may be above 0

    eta: noise put back at each step, relative to DDPM's
    generators: one per picture, the source of that noise; None takes torch's global one
    """

    spacing: ClassVar[Spacing]
    stochastic: ClassVar[bool] = False

    def __init__(
        self,
        levels: NoiseLevels,
        eta: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        check(0 <= eta <= (1 if self.stochastic else 0), "eta", eta, "0 to 1 for ddim, 0 for other samplers")
        self.levels = levels
        self.eta = eta
        self.generators = generators

    @classmethod
    def times(cls, schedule: Schedule, steps: int, spacing: Spacing) -> Tensor:
        """(steps,) float64, decreasing: this sampler's version of the spacing."""
        return schedule.times(steps, spacing)

    @abstractmethod
    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        """x at level i -> x at level i + 1. Steps are taken in order."""

    def predict(self, denoise: Denoise, x: Tensor, i: int) -> Prediction:
        # Half precision cannot hold the timestep 999.
        dtype = torch.promote_types(x.dtype, torch.float32)
        return denoise(x, torch.full((len(x),), self.levels.t[i], dtype=dtype, device=x.device))

    def noise_like(self, x: Tensor) -> Tensor:
        if self.generators is None:
            return torch.randn_like(x)
        draws = [
            torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in self.generators
        ]
        return torch.stack(draws).to(x.device)


class DDIM(Sampler):
    """Song et al. 2010.02502, eq. 12, with their alpha_0 = 1: the last step ends on x_0.

    Their sigma_tau(eta) (eq. 16) is eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2) for any schedule;
    eta = 1 is ancestral sampling as in DDPM.
    """

    spacing = "leading"
    stochastic = True

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        p = self.predict(denoise, x, i)
        alpha, alpha_next = self.levels.alpha[i : i + 2]
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        fresh = self.eta**2 * (1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)  # share of sigma'^2
        added = sigma_next * math.sqrt(fresh)
        x = alpha_next * p.x0 + sigma_next * math.sqrt(1 - fresh) * p.eps
        return x + added * self.noise_like(x) if added > 0 else x


class Euler(Sampler):
    """Euler's method on the probability-flow ODE.

    Variance preserving, in EDM's variables (Karras et al. 2206.00364): z = x / alpha and s = sigma / alpha
    obey dz/ds = eps, so z' = z + (s' - s) eps = x0 + s' eps. Rectified flow: dx/dt = eps - x0, so
    x' = x + (t' - t)(eps - x0). Both are x' = alpha' x0 + sigma' eps, which is DDIM with eta = 0: the two
    differ in their default grids only.
    """

    spacing = "linspace"

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        p = self.predict(denoise, x, i)
        return self.levels.alpha[i + 1] * p.x0 + self.levels.sigma[i + 1] * p.eps


class DPMSolverPlusPlus2M(Sampler):
    """DPM-Solver++(2M), Lu et al. 2211.01095, algorithm 2: second order from one denoiser call per step, with
    first-order steps where it starts and where sigma' = 0."""

    spacing = "linspace"

    def __init__(
        self,
        levels: NoiseLevels,
        eta: float = 0.0,
        generators: Sequence[torch.Generator] | None = None,
    ) -> None:
        super().__init__(levels, eta, generators)
        self._previous: tuple[Tensor, float] | None = None  # x0 and h of the step before

    @classmethod
    def times(cls, schedule: Schedule, steps: int, spacing: Spacing) -> Tensor:
        """On discrete schedules the published grids count the clean end as one of their points, and round to
        training steps."""
        if spacing == "trailing" or not isinstance(schedule, DiscreteSchedule):
            return super().times(schedule, steps, spacing)
        limit = schedule.num_train_steps - (2 if spacing == "leading" else 1)
        check(1 <= steps <= limit, "steps", steps, f"1 to {limit} for dpmpp_2m with the {spacing} spacing")
        return super().times(schedule, steps + 1, spacing)[:-1].round()

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        x0 = self.predict(denoise, x, i).x0
        alpha, alpha_next = self.levels.alpha[i : i + 2]
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        # lambda = log(alpha / sigma) and h = lambda' - lambda. h is infinite from pure noise (alpha = 0) and
        # to clean data (sigma' = 0); exp(-h) is 0 there.
        exp_minus_h = alpha * sigma_next / (alpha_next * sigma)
        h = -math.log(exp_minus_h) if exp_minus_h > 0 else math.inf
        d = x0
        if self._previous is not None and math.isfinite(h):
            x0_previous, h_previous = self._previous
            d = x0 + h / (2 * h_previous) * (x0 - x0_previous)
        self._previous = (x0, h)
        return sigma_next / sigma * x + alpha_next * (1 - exp_minus_h) * d


SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIM, "euler": Euler, "dpmpp_2m": DPMSolverPlusPlus2M}


def sample(
    denoise: Denoise,
    noise: Tensor,
    schedule: Schedule,
    sampler: str,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    spacing: Spacing | None = None,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Walks from noise to a sample of the data.

    The walk starts at x = noise on every schedule and grid. (k-diffusion, and diffusers' Euler on "linspace"
    and "trailing", start at sigma_T noise, 0.2% less in Stable Diffusion.) Whether gradients are recorded is
    the caller's choice.

    denoise: (x_t, t) -> Prediction; see `Denoise`
    noise: (B, ...) ~ N(0, I), float32 or float64; the walk keeps its dtype and device
    sampler: a name in SAMPLERS
    steps: calls of the denoiser
    progress: called with (steps done, steps) after every step
    spacing: time grid; None takes the schedule's own or else the sampler's
    eta, generators: see `Sampler`
    Raises ConfigError for a sampler, spacing, eta or number of steps that is not to be had.
    """
    check(sampler in SAMPLERS, "sampler", sampler, ", ".join(SAMPLERS))
    cls = SAMPLERS[sampler]
    solver = cls(noise_levels(cls, schedule, steps, spacing), eta, generators)
    x = noise
    for i in range(steps):
        x = solver.step(denoise, x, i)
        if progress is not None:
            progress(i + 1, steps)
    return x


def noise_levels(
    cls: type[Sampler], schedule: Schedule, steps: int, spacing: Spacing | None = None
) -> NoiseLevels:
    """The levels of `steps` steps that end on clean data."""
    t = cls.times(schedule, steps, spacing or schedule.spacing or cls.spacing)
    alpha, sigma = schedule.alpha_sigma(t)
    return NoiseLevels(t.tolist(), [*alpha.tolist(), 1.0], [*sigma.tolist(), 0.0])
