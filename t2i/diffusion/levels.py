"""The noise levels that a sampler walks down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.schedules import DiscreteSchedule, Schedule

Level = tuple[float, float]  # alpha and sigma
CLEAN: Level = (1.0, 0.0)


@dataclass(frozen=True)
class NoiseLevels:
    """The grid a sampler walks down. Host numbers: no step waits for the device.

    t: the times of the grid, its end left out; `steps` values
    alpha, sigma: of the levels, and last where the walk ends; `steps` + 1 values
    at_t: alpha and sigma of the schedule at those times, where the levels lie beside them (Karras' do)
    below, above: alpha and sigma one stride of T // steps down and up from each time, for the two of diffusers'
        classes that step so; on most grids these are the neighbours, which None stands for
    """

    t: Sequence[float]
    alpha: Sequence[float]
    sigma: Sequence[float]
    at_t: Sequence[Level] | None = None
    below: Sequence[Level] | None = None
    above: Sequence[Level] | None = None

    def level(self, i: int) -> Level:
        return self.alpha[i], self.sigma[i]

    def end(self, i: int) -> Level:
        """Where step i ends."""
        return self.level(i + 1) if self.below is None else self.below[i]

    def before(self, i: int) -> Level:
        """Where a step that ends on level i began."""
        return self.level(i - 1) if self.above is None else self.above[i]


def first_level(schedule: Schedule) -> Level:
    """The schedule's time 0, which on discrete schedules is the first training step."""
    alpha, sigma = schedule.alpha_sigma(torch.zeros(1, dtype=torch.float64))
    return alpha.item(), sigma.item()


def levels_at(schedule: DiscreteSchedule, t: Tensor) -> list[tuple[float, Level]]:
    """Each time with alpha and sigma there; those beyond the schedule with those of its ends."""
    alpha, sigma = schedule.alpha_sigma(t.clamp(0, schedule.num_train_steps - 1))
    return [(time, (a, s)) for time, a, s in zip(t.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]


def karras_levels(first: float, last: float, steps: int, rho: float = 7.0) -> Tensor:
    """(steps,) float64 noise levels sigma / alpha, 2206.00364 eq. 5."""
    check_finite_end(first, "use_karras_sigmas")
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (first ** (1 / rho) + share * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def exponential_levels(first: float, last: float, steps: int) -> Tensor:
    """(steps,) float64 noise levels sigma / alpha whose logarithms are evenly spaced."""
    check_finite_end(first, "use_exponential_sigmas")
    return torch.linspace(math.log(first), math.log(last), steps, dtype=torch.float64).exp()


def check_finite_end(first: float, key: str) -> None:
    check(math.isfinite(first), f"sampling.{key}", True, "false on a schedule that ends on pure noise")


def as_tensors(level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
    """(1,) tensors of x's dtype and device."""
    return x.new_full((1,), level[0]), x.new_full((1,), level[1])
