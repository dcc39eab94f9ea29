"""Multistep solvers in lambda = log(alpha / sigma), which extrapolate x0: DPM-Solver++ and UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.config import GridConfig
from t2i.diffusion.levels import CLEAN, Level, NoiseLevels, first_level
from t2i.diffusion.sampler import Denoise, Sampler
from t2i.diffusion.schedules import DiscreteSchedule, Schedule, Spacing


class DPMSolverPlusPlus2M(Sampler):
    """DPM-Solver++(2M), Lu et al. 2211.01095, algorithm 2: second order from one denoiser call per step, with
    first-order steps where it starts and where sigma' = 0, and at the end of fewer than 15 steps."""

    spacing = "linspace"
    karras = True
    whole_times = True
    first_order_end_below: ClassVar[float] = 15  # steps

    def __init__(self, levels: NoiseLevels, generators: Sequence[torch.Generator] | None = None) -> None:
        super().__init__(levels, generators)
        self._previous: tuple[Tensor, float] | None = None  # x0 and h of the step before

    @classmethod
    def times(cls, schedule: Schedule, steps: int, spacing: Spacing, steps_offset: int) -> Tensor:
        """On discrete schedules the published grids count the clean end as one of their points, and round to
        training steps."""
        if spacing == "trailing" or not isinstance(schedule, DiscreteSchedule):
            return super().times(schedule, steps, spacing, steps_offset)
        limit = schedule.num_train_steps - (1 + steps_offset if spacing == "leading" else 1)
        check(
            1 <= steps <= limit,
            "sampling.steps",
            steps,
            f"1 to {limit} for dpmpp_2m with the {spacing} spacing",
        )
        return super().times(schedule, steps + 1, spacing, steps_offset)[:-1].round()

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        return CLEAN if grid.final_sigmas_type == "zero" else first_level(schedule)

    @classmethod
    def karras_ends(cls, schedule: DiscreteSchedule, level: Tensor) -> tuple[float, float]:
        """Here those of the schedule, whatever the grid."""
        alpha, sigma = schedule.alpha_sigma(torch.tensor([schedule.num_train_steps - 1.0, 0.0]).double())
        first, last = (sigma / alpha).tolist()
        return first, last

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        return self.advance(self.predict(denoise, x, i).x0, x, i)

    def advance(self, x0: Tensor, x: Tensor, i: int) -> Tensor:
        """x after step i, for which x0 was predicted."""
        exp_minus_h, d = self.extrapolated(x0, i)
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        return sigma_next / sigma * x + self.levels.alpha[i + 1] * (1 - exp_minus_h) * d

    def extrapolated(self, x0: Tensor, i: int) -> tuple[float, Tensor]:
        """exp(-h) of step i, where lambda = log(alpha / sigma) and h = lambda' - lambda, and x0 extrapolated to the
        middle of the step. h is infinite from pure noise (alpha = 0) and to clean data (sigma' = 0)."""
        alpha, alpha_next = self.levels.alpha[i : i + 2]
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        exp_minus_h = alpha * sigma_next / (alpha_next * sigma)
        h = -math.log(exp_minus_h) if exp_minus_h > 0 else math.inf
        d = x0
        first_order = i == self.num_steps() - 1 and self.num_steps() < self.first_order_end_below
        if self._previous is not None and math.isfinite(h) and not first_order:
            x0_previous, h_previous = self._previous
            d = x0 + h / (2 * h_previous) * (x0 - x0_previous)
        self._previous = (x0, h)
        return exp_minus_h, d


class DPMSolverPlusPlus2MSDE(DPMSolverPlusPlus2M):
    """SDE-DPM-Solver++(2M), Lu et al. 2211.01095, eq. 20: the same for the reverse SDE, which takes twice the step
    towards the data and adds noise."""

    def advance(self, x0: Tensor, x: Tensor, i: int) -> Tensor:
        exp_minus_h, d = self.extrapolated(x0, i)
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        fresh = 1 - exp_minus_h**2
        x = sigma_next / sigma * exp_minus_h * x + self.levels.alpha[i + 1] * fresh * d
        added = sigma_next * math.sqrt(fresh)
        return x + added * self.noise_like(x) if added > 0 else x


class UniPC(DPMSolverPlusPlus2M):
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2302.04867, algorithms 5 to 8): its predictor is DPM-Solver++(2M)'s
    step, first order at the end, and what the denoiser says where a step ended corrects that step: third order
    without a further call."""

    first_order_end_below = math.inf

    def __init__(self, levels: NoiseLevels, generators: Sequence[torch.Generator] | None = None) -> None:
        super().__init__(levels, generators)
        # Of the step before: x where it began, x0 there, exp(-h), h, and x0 and h of the one before where it was of
        # second order.
        self._taken: tuple[Tensor, Tensor, float, float, tuple[Tensor, float] | None] | None = None

    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        x0 = self.predict(denoise, x, i).x0
        if self._taken is not None:
            x = self.corrected(x0, i)
        before = self._previous
        exp_minus_h, d = self.extrapolated(x0, i)
        _, h = self._previous or (x0, math.inf)
        self._taken = (x, x0, exp_minus_h, h, None if d is x0 else before)
        sigma, sigma_next = self.levels.sigma[i : i + 2]
        return sigma_next / sigma * x + self.levels.alpha[i + 1] * (1 - exp_minus_h) * d

    def corrected(self, x0: Tensor, i: int) -> Tensor:
        """x at level i again, now that x0 was predicted there."""
        assert self._taken is not None
        x, x0_first, exp_minus_h, h, before = self._taken
        if before is None:
            d = x0_first + (x0 - x0_first) / 2
        else:
            x0_before, h_before = before
            ratio = -h_before / h
            # Weights that make the step exact where x0 is a polynomial of second degree in lambda.
            first = 1 / (1 - exp_minus_h) - 1 / h
            second = 1 / (1 - exp_minus_h) - 2 * first / h
            weight = (second - first) / (ratio - 1)
            d = x0_first + weight / ratio * (x0_before - x0_first) + (first - weight) * (x0 - x0_first)
        sigma = self.levels.sigma[i]
        return sigma / self.levels.sigma[i - 1] * x + self.levels.alpha[i] * (1 - exp_minus_h) * d
