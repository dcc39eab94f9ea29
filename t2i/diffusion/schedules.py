"""Noise schedules: how much signal and how much noise x_t holds at time t.

Every schedule is x_t = alpha_t x_0 + sigma_t eps with eps ~ N(0, I); t = 0 is the clean end. Objectives and
samplers see a schedule through (alpha, sigma) only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import get_args

import torch
from torch import Tensor

from t2i.config import check
from t2i.diffusion.config import BetaName, ScheduleConfig, Spacing, TimeDistribution
from t2i.nn.precision import widened


def build_schedule(config: ScheduleConfig) -> Schedule:
    if config.name == "flow":
        assert config.shift is not None
        return FlowSchedule(config.num_train_steps, config.shift, config.time_distribution)
    return DiscreteSchedule(configured_betas(config))


def configured_betas(config: ScheduleConfig) -> Tensor:
    """(T,) float64 of any schedule but flow."""
    assert config.name != "flow"
    table = betas(config.name, config.num_train_steps, config.beta_start, config.beta_end)
    return zero_terminal_snr(table) if config.zero_terminal_snr else table


def betas(name: BetaName, num_train_steps: int, beta_start: float | None, beta_end: float | None) -> Tensor:
    """(T,) float64, the variance that forward step t adds.

    linear: Ho et al. 2006.11239, section 4. scaled_linear: linear in sqrt(beta), Rombach et al. 2112.10752.
    cosine: Nichol & Dhariwal 2102.09672, eq. 17 (s = 0.008, beta at most 0.999); uses neither beta_start nor
    beta_end.
    """
    if name == "cosine":
        time = torch.linspace(0, 1, num_train_steps + 1, dtype=torch.float64)
        alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)
    assert beta_start is not None
    assert beta_end is not None
    if name == "linear":
        return torch.linspace(beta_start, beta_end, num_train_steps, dtype=torch.float64)
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_steps, dtype=torch.float64) ** 2


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """(T,) -> (T,) float64: sqrt(alpha bar) shifted and scaled so that its first value stays and its last is 0,
    Lin et al. 2305.08891, algorithm 1. The last beta becomes 1."""
    root = torch.cumprod(1 - betas.double(), dim=0).sqrt()
    alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """(B,) or a scalar -> (B, 1, ..., 1) with as many axes as x, to be multiplied with it."""
    return value.view(-1, *[1] * (x.ndim - 1))


class Schedule(ABC):
    """Times t are (B,) tensors, in [0, T - 1] for DiscreteSchedule and in [0, 1] for FlowSchedule.

    num_train_steps: T
    spacing: the time grid that samplers use here, or None where each sampler has its own
    """

    num_train_steps: int
    spacing: Spacing | None = None

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped and placed as t; float64 where t is, else float32."""

    @abstractmethod
    def training_times(self, uniform: Tensor) -> Tensor:
        """(B,) uniform in [0, 1) -> (B,) times to train at."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What the denoiser is given for t: floating point, on the scale 0 to T."""

    @abstractmethod
    def times(self, steps: int, spacing: Spacing, steps_offset: int = 1) -> Tensor:
        """(steps,) float64 on the CPU, decreasing: where a sampler asks the denoiser. The clean end is not
        among them. Raises ConfigError for a number of steps or a spacing that the schedule does not have.

        steps_offset: added to the times of "leading" on discrete schedules
        """

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps; x0 and eps: (B, ...), t: (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps

    def snr(self, t: Tensor) -> Tensor:
        """(B,) signal-to-noise ratio alpha_t^2 / sigma_t^2; infinite where sigma_t is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2


class DiscreteSchedule(Schedule):
    """Variance preserving, alpha^2 + sigma^2 = 1, in T discrete steps (DDPM, Ho et al. 2006.11239).

    A t between two training steps takes sigma/alpha, the noise level of EDM (Karras et al. 2206.00364),
    interpolated linearly, as diffusers' EulerDiscreteScheduler does.

    betas: (T,); the last is 1 where the schedule ends on pure noise, which samplers then have to start from
        (2305.08891, section 3.3)
    alphas_cumprod: (T,) float64 on the CPU, alpha_t^2 ("alpha bar")
    """

    def __init__(self, betas: Tensor) -> None:
        self.num_train_steps = len(betas)
        self.alphas_cumprod = torch.cumprod(1 - betas.double(), dim=0)
        self._noise_level = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        self._ends_on_noise = bool(self.alphas_cumprod[-1] == 0)
        if self._ends_on_noise:
            self.spacing = "trailing"
        # One copy per device, so that a train step moves nothing there.
        self._placed: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        key = (t.device, torch.float64 if t.dtype == torch.float64 else torch.float32)
        if key not in self._placed:
            self._placed[key] = self._noise_level.to(key[1]).to(key[0])
        table = self._placed[key]
        if t.is_floating_point():
            low = t.long().clamp(0, self.num_train_steps - 2)
            share, below, above = t.to(key[1]) - low, table[low], table[low + 1]
            level = torch.lerp(below, above, share)
            if self._ends_on_noise:  # no share can be taken of an infinite level
                level = torch.where(share < 1, torch.where(share > 0, level, below), above)
        else:
            level = table[t]
        return (1 + level**2).rsqrt(), (1 + level**-2).rsqrt()

    def time_of(self, level: Tensor) -> Tensor:
        """(n,) float64 noise levels sigma / alpha -> times, between training steps by the logarithm of the level, as
        diffusers and k-diffusion have it; `alpha_sigma` interpolates the level itself."""
        log = self._noise_level.log()
        low = (torch.searchsorted(log, level.log(), right=True) - 1).clamp(0, self.num_train_steps - 2)
        return low + ((level.log() - log[low]) / (log[low + 1] - log[low])).clamp(0, 1)

    def training_times(self, uniform: Tensor) -> Tensor:
        """(B,) int64, uniform over 0 to T - 1."""
        return (uniform * self.num_train_steps).long().clamp(max=self.num_train_steps - 1)

    def model_time(self, t: Tensor) -> Tensor:
        return t if t.is_floating_point() else widened(t)

    def times(self, steps: int, spacing: Spacing, steps_offset: int = 1) -> Tensor:
        """The spacings of Lin et al. 2305.08891, table 2; Stable Diffusion 1 has steps_offset=1. "linspace" may fall
        between training steps."""
        total = self.num_train_steps
        limit = total - steps_offset if spacing == "leading" else total
        check(1 <= steps <= limit, "sampling.steps", steps, f"1 to {limit} with the {spacing} spacing")
        if spacing == "linspace":
            return torch.linspace(total - 1, 0, steps, dtype=torch.float64)
        index = torch.arange(steps, dtype=torch.float64)
        if spacing == "leading":
            times = index.flip(0) * (total // steps) + steps_offset
            allowed = f"such that the last of {steps} steps lies below {total}"
            check(times[0].item() < total, "sampling.steps_offset", steps_offset, allowed)
            return times
        check(spacing == "trailing", "sampling.timestep_spacing", spacing, ", ".join(get_args(Spacing)))
        return (total - index * (total / steps)).round() - 1


class FlowSchedule(Schedule):
    """Rectified flow, x_t = (1 - t) x_0 + t eps with t in [0, 1] (Liu et al. 2209.03003, Lipman et al.
    2210.02747).

    shift moves both training times and sampling times, t -> shift t / (1 + (shift - 1) t)
    (Esser et al. 2403.03206, eq. 23, with shift = sqrt(m / n)). time_distribution "logit_normal" is their
    eq. 19 with location 0 and scale 1.
    """

    spacing: Spacing | None = "trailing"

    def __init__(
        self,
        num_train_steps: int = 1000,
        shift: float = 1.0,
        time_distribution: TimeDistribution = "uniform",
    ) -> None:
        self.num_train_steps = num_train_steps
        self.shift = shift
        self.time_distribution = time_distribution

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = widened(t)
        return 1 - t, t

    def training_times(self, uniform: Tensor) -> Tensor:
        """(B,) floating point in [0, 1]."""
        logit_normal = self.time_distribution == "logit_normal"
        return self._shifted(torch.special.ndtri(uniform).sigmoid() if logit_normal else uniform)

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.num_train_steps

    def times(self, steps: int, spacing: Spacing, steps_offset: int = 1) -> Tensor:
        """ "trailing": 1, 1 - 1/steps, ..., 1/steps. "linspace": from 1 to 1/T, as diffusers spaces SD3."""
        check(steps >= 1, "sampling.steps", steps, "1 or more")
        allowed = ("trailing", "linspace")
        check(
            spacing in allowed,
            "sampling.timestep_spacing",
            spacing,
            ", ".join(allowed) + " with the flow schedule",
        )
        last = 1 / (steps if spacing == "trailing" else self.num_train_steps)
        return self._shifted(torch.linspace(1, last, steps, dtype=torch.float64))

    def _shifted(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)
