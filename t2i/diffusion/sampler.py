"""What all samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from t2i.diffusion.config import GridConfig
from t2i.diffusion.levels import CLEAN, Level, NoiseLevels, as_tensors
from t2i.diffusion.objectives import Prediction, target, to_x0_eps
from t2i.diffusion.schedules import DiscreteSchedule, Schedule, Spacing
from t2i.nn.transfer import placed

# denoise(x_t, t) with x_t: (B, ...) and t: (B,) floating point, in the schedule's own time.
Denoise = Callable[[Tensor, Tensor], Prediction]
# constrain(x, level) -> x at that level, with what is known of it in its place.
Constrain = Callable[[Tensor, Level], Tensor]


class Sampler(ABC):
    """One walk down the noise levels; a sampler of its own for every walk, as some remember past steps.

    spacing: the time grid on discrete schedules, where nothing else is said
    karras: whether it can walk Karras' levels, and exponential ones
    by_stride: whether its steps go by T // steps on discrete schedules, whatever the grid
    whole_times: whether "linspace" is rounded to training steps

    generators: one per picture, the source of what noise is added on the way; None takes torch's global one
    constrain: changes x at the levels on the way at which the denoiser is asked within a step
    """

    spacing: ClassVar[Spacing]
    karras: ClassVar[bool] = False
    by_stride: ClassVar[bool] = False
    whole_times: ClassVar[bool] = False

    def __init__(self, levels: NoiseLevels, generators: Sequence[torch.Generator] | None = None) -> None:
        self.levels = levels
        self.generators = generators
        self.constrain: Constrain = lambda x, level: x

    @classmethod
    def times(cls, schedule: Schedule, steps: int, spacing: Spacing, steps_offset: int) -> Tensor:
        """(steps,) float64, decreasing: this sampler's version of the spacing."""
        times = schedule.times(steps, spacing, steps_offset)
        return times.round() if cls.whole_times and isinstance(schedule, DiscreteSchedule) else times

    @classmethod
    def end_level(cls, schedule: Schedule, grid: GridConfig) -> Level:
        """Where the walk ends: on x_0, or else on the schedule's time 0, which on discrete schedules is the first
        training step."""
        return CLEAN

    @classmethod
    def karras_ends(cls, schedule: DiscreteSchedule, level: Tensor) -> tuple[float, float]:
        """sigma / alpha of the first and the last of such levels, given those of the grid."""
        return level[0].item(), level[-1].item()

    def grid_index(self, i: int) -> int:
        """The noise level that step i starts from."""
        return i

    def num_steps(self) -> int:
        return len(self.levels.sigma) - 1

    def start(self, noise: Tensor, spacing: Spacing) -> Tensor:
        """x at the first level, where nothing is there but noise."""
        return noise

    @abstractmethod
    def step(self, denoise: Denoise, x: Tensor, i: int) -> Tensor:
        """x after step i. Steps are taken in order; the first may be a later one than 0."""

    def predict(self, denoise: Denoise, x: Tensor, index: int) -> Prediction:
        # Half precision cannot hold the timestep 999.
        dtype = torch.promote_types(x.dtype, torch.float32)
        p = denoise(x, torch.full((len(x),), self.levels.t[index], dtype=dtype, device=x.device))
        if self.levels.at_t is None:
            return p
        # The network is asked at a time near the level: what it put out is kept, and means x0 and eps at the level.
        output = target(p.objective, p.x0, p.eps, *as_tensors(self.levels.at_t[index], x))
        return to_x0_eps(p.objective, output, x, *as_tensors(self.levels.level(index), x))

    def noise_like(self, x: Tensor) -> Tensor:
        if self.generators is None:
            return torch.randn_like(x)
        draws = [
            torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=g.device) for g in self.generators
        ]
        return placed(torch.stack(draws), x.device)
