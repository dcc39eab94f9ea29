"""The variance of a step of the reverse process, fixed or learned, and the bound that trains it (Nichol & Dhariwal
2102.09672)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from t2i.diffusion.schedules import DiscreteSchedule, per_sample

Number = TypeVar("Number", float, Tensor)

HALF_LEVEL = 1 / 255  # half of what lies between two of the 256 levels of a picture in [-1, 1]
MIN_PROBABILITY = 1e-12  # of a level, so that its logarithm is finite


@dataclass(frozen=True)
class Posterior(Generic[Number]):
    """q(x_s | x_t, x_0) for s below t: a Gaussian of mean x0_weight x_0 + x_weight x_t (2006.11239, eq. 6 and 7).

    variance: "beta tilde", the least that a step of the reverse process may have
    beta: the variance of the step forward from s to t, the most that it may have
    """

    x0_weight: Number
    x_weight: Number
    variance: Number
    beta: Number


def posterior(alpha: Number, sigma: Number, alpha_end: Number, sigma_end: Number) -> Posterior[Number]:
    """For a step from the noise level (alpha, sigma) down to (alpha_end, sigma_end), alpha^2 + sigma^2 = 1. The levels
    need not be neighbours: beta is then that of the schedule with all between them left out (2102.09672, eq. 19)."""
    beta = 1 - (alpha / alpha_end) ** 2
    kept = (sigma_end / sigma) ** 2
    return Posterior(alpha_end * beta / sigma**2, alpha / alpha_end * kept, beta * kept, beta)


class ReverseSteps:
    """The steps from each training time t to t - 1, from 0 to clean data.

    steps: the posterior at each t, (T,) float64 on the CPU. The variance at 0 is none; as published, that at
        1 stands there
    """

    def __init__(self, schedule: DiscreteSchedule) -> None:
        alpha, sigma = schedule.alpha_sigma(torch.arange(schedule.num_train_steps).double())
        one, zero = alpha.new_ones(1), alpha.new_zeros(1)
        self.num_train_steps = schedule.num_train_steps
        self.steps = posterior(alpha, sigma, torch.cat([one, alpha[:-1]]), torch.cat([zero, sigma[:-1]]))
        self.steps.variance[0] = self.steps.variance[1]
        # One copy per device, so that a train step moves nothing there.
        self._placed: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def posterior(self, t: Tensor, like: Tensor) -> Posterior[Tensor]:
        """t: (B,) whole times -> numbers (B, 1, ..., 1) of the dtype and on the device of `like` (B, ...)."""
        key, step = (like.device, like.dtype), self.steps
        if key not in self._placed:
            tables = (step.x0_weight, step.x_weight, step.variance, step.beta)
            self._placed[key] = [table.to(like) for table in tables]
        return Posterior(*(per_sample(table[t.long()], like) for table in self._placed[key]))

    def bound(self, x0: Tensor, x_t: Tensor, t: Tensor, predicted_x0: Tensor, share: Tensor) -> Tensor:
        """(B,) bits per number of the term L_t of the variational bound (2102.09672, eq. 4 to 6): how far the step that
        the model takes at x_t is from the posterior's, at t = 0 what it leaves unsaid of a picture of 256 levels.

        x0, x_t, predicted_x0: (B, ...); t: (B,) whole times; share: see `log_variance`
        """
        q = self.posterior(t, x_t)
        mean = q.x0_weight * predicted_x0 + q.x_weight * x_t
        log_variance_p = log_variance(share, q)
        distance = normal_kl(q.x0_weight * x0 + q.x_weight * x_t, q.variance.log(), mean, log_variance_p)
        unsaid = -level_log_probability(x0, mean, 0.5 * log_variance_p)
        nats = torch.where(per_sample(t, x_t) == 0, unsaid, distance)
        return nats.flatten(1).mean(1) / math.log(2)


def log_variance(share: Tensor, step: Posterior[float] | Posterior[Tensor]) -> Tensor:
    """share log beta + (1 - share) log "beta tilde" (2102.09672, eq. 15), share from 0 to 1."""
    return share * _log(step.beta) + (1 - share) * _log(step.variance)


def _log(number: float | Tensor) -> float | Tensor:
    return number.log() if isinstance(number, Tensor) else math.log(number)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) in nats, number by number."""
    ratio = (log_variance1 - log_variance2).exp() + (mean1 - mean2) ** 2 * (-log_variance2).exp()
    return 0.5 * (ratio - 1 + log_variance2 - log_variance1)


def level_log_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of the level that x in [-1, 1] is one of 256, under a Gaussian; the outermost levels reach to infinity
    (2006.11239, eq. 13)."""
    above = torch.special.ndtr((x + HALF_LEVEL - mean) * (-log_scale).exp())
    below = torch.special.ndtr((x - HALF_LEVEL - mean) * (-log_scale).exp())
    above = torch.where(x > 1 - HALF_LEVEL, 1.0, above)
    below = torch.where(x < -1 + HALF_LEVEL, 0.0, below)
    return (above - below).clamp(min=MIN_PROBABILITY).log()
