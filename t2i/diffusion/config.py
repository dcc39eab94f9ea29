"""What a configuration says of the noise schedule and the objective. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from t2i.config import check
from t2i.schema import MAX_NUMBER, Upgraded, check_number, check_scale

BetaName = Literal["linear", "scaled_linear", "cosine"]
ScheduleName = Literal["linear", "scaled_linear", "cosine", "flow"]
Spacing = Literal["leading", "linspace", "trailing"]
TimeDistribution = Literal["uniform", "logit_normal"]
FinalSigmas = Literal["zero", "sigma_min"]
Objective = Literal["eps", "x0", "v", "flow"]
SamplerName = Literal[
    "ddim", "ddpm", "pndm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"
]


@dataclass(frozen=True)
class ScheduleConfig(Upgraded):
    """Which noise schedule a model is trained on.

    name: "linear" (DDPM), "scaled_linear" (Stable Diffusion), "cosine" (improved DDPM) or "flow" (rectified
        flow)
    num_train_steps: T; for flow only the scale of the time that the denoiser is given
    beta_start, beta_end: of linear and scaled_linear; null for the others
    shift: of flow; above 1 moves time towards noise, for pictures of higher resolution; null for the others
    time_distribution: how training draws t; logit_normal for flow only
    zero_terminal_snr: rescales the schedule so that nothing of x_0 is left at its end (Lin et al. 2305.08891,
        algorithm 1), and has samplers start there
    """

    name: ScheduleName
    num_train_steps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    shift: float | None = None
    time_distribution: TimeDistribution = "uniform"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        names = get_args(ScheduleName)
        check(self.name in names, "schedule.name", self.name, ", ".join(names))
        check(self.num_train_steps >= 2, "schedule.num_train_steps", self.num_train_steps, "2 or more")
        where = f"with schedule.name={self.name}"
        start, end, shift = self.beta_start, self.beta_end, self.shift
        if self.name in ("linear", "scaled_linear"):
            ok = start is not None and 0 < start < 1
            check(ok, "schedule.beta_start", start, f"above 0 and below 1 {where}")
            ok = start is not None and end is not None and start <= end < 1
            check(ok, "schedule.beta_end", end, f"schedule.beta_start ({start}) or more, below 1")
        else:
            check(start is None, "schedule.beta_start", start, f"null {where}")
            check(end is None, "schedule.beta_end", end, f"null {where}")
        distributions = get_args(TimeDistribution)
        ok = self.time_distribution in distributions
        check(ok, "schedule.time_distribution", self.time_distribution, ", ".join(distributions))
        if self.name != "flow":
            check(shift is None, "schedule.shift", shift, f"null {where}")
            ok = self.time_distribution == "uniform"
            check(ok, "schedule.time_distribution", self.time_distribution, f"uniform {where}")
        else:
            ok = shift is not None and 0 < shift < math.inf
            check(ok, "schedule.shift", shift, f"above 0 {where}")
            key, value = "schedule.zero_terminal_snr", self.zero_terminal_snr
            check(not value, key, value, "false with schedule.name=flow, which ends on pure noise as it is")

    @classmethod
    def upgraded(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Each schedule had the values of the others too, unused."""
        unused: dict[str, float] = {}
        if values.get("name") != "flow":
            unused["shift"] = 1.0
        if values.get("name") not in ("linear", "scaled_linear"):
            unused |= {"beta_start": 0.00085, "beta_end": 0.012}
        return {key: value for key, value in values.items() if key not in unused or unused[key] != value}


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Where samplers ask the denoiser and where they end, with the names that diffusers' schedulers have for it. The
    defaults are those of Stable Diffusion 1's scheduler config.

    timestep_spacing: null takes the schedule's own, or else the sampler's
    steps_offset: added to the times of "leading"
    set_alpha_to_one: whether ddim and pndm end on clean data, or else on the first training step; null is diffusers'
        default, true for ddim and false for pndm
    final_sigmas_type: whether euler, unipc and dpmpp end on clean data ("zero"), or else on the first training step
    use_karras_sigmas: euler, heun, unipc and dpmpp: noise levels spaced as in Karras et al. 2206.00364, eq. 5
    use_exponential_sigmas: the same samplers: their logarithms evenly spaced
    """

    timestep_spacing: Spacing | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    final_sigmas_type: FinalSigmas = "zero"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False

    def __post_init__(self) -> None:
        ok = 0 <= self.steps_offset <= MAX_NUMBER
        check(ok, "sampling.steps_offset", self.steps_offset, f"0 to {MAX_NUMBER:,}")
        both = self.use_karras_sigmas and self.use_exponential_sigmas
        check(not both, "sampling.use_exponential_sigmas", True, "false with sampling.use_karras_sigmas=true")


@dataclass(frozen=True, kw_only=True)
class DiffusionSampling(GridConfig):
    """How a diffusion model draws.

    guidance_scale: of classifier-free guidance (2207.12598); 1 is without
    guidance_rescale: 0 to 1: how far guided outputs are brought back to the standard deviation of the unguided ones
        (2305.08891, section 3.4)
    guidance_above, guidance_below: guidance at noise levels sigma / alpha above and up to these alone (2404.07724);
        null: no limit. Elsewhere the model is asked once in place of twice
    eta: of sampler ddim: the share of noise that each step adds, 0 to 1 (2010.02502, eq. 16); 1 is ddpm
    """

    sampler: SamplerName
    steps: int
    guidance_scale: float
    guidance_rescale: float = 0.0
    guidance_above: float | None = None
    guidance_below: float | None = None
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("sampling.steps", self.steps)
        check_scale("sampling.guidance_scale", self.guidance_scale)
        for key in ("guidance_rescale", "eta"):
            check(0 <= getattr(self, key) <= 1, f"sampling.{key}", getattr(self, key), "0 to 1")
        check(self.eta == 0 or self.sampler == "ddim", "sampling.eta", self.eta, "0 but with sampler ddim")
        low, high = self.guidance_above, self.guidance_below
        check(low is None or 0 <= low < math.inf, "sampling.guidance_above", low, "0 or more, or null")
        ok = high is None or (low or 0) < high
        check(ok, "sampling.guidance_below", high, f"above sampling.guidance_above ({low or 0}), or null")

    @property
    def guidance_interval(self) -> tuple[float, float]:
        """Noise levels between which there is guidance."""
        high = self.guidance_below
        return self.guidance_above or 0.0, math.inf if high is None else high


def check_objective(objective: str, schedule: ScheduleConfig) -> None:
    """Raises ConfigError where `objective` is unknown or not defined on `schedule`: v needs
    alpha^2 + sigma^2 = 1, flow needs alpha + sigma = 1, and where no signal is left eps says nothing of x_0."""
    allowed: tuple[str, ...] = ("eps", "x0", "v")
    where = f"schedule.name={schedule.name}"
    if schedule.name == "flow":
        allowed = ("eps", "x0", "flow")
    elif schedule.zero_terminal_snr:
        allowed, where = ("x0", "v"), "schedule.zero_terminal_snr=true"
    check(objective in allowed, "objective", objective, f"{', '.join(allowed)} with {where}")
