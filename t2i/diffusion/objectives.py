"""What the network predicts, and how its output becomes x_0 and eps again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from t2i.diffusion.config import Objective
from t2i.diffusion.schedules import Schedule, per_sample
from t2i.nn.precision import widened


@dataclass(frozen=True)
class Prediction:
    """The clean picture and the noise that a denoiser sees in x_t = alpha x0 + sigma eps, shaped as x_t.

    objective: what the network itself put out
    variance_share: where the variance of a step is said too, how far the logarithm of each number's has come from
        the least to the most that it may be, from 0 to 1 (`t2i.diffusion.variance.log_variance`)
    """

    x0: Tensor
    eps: Tensor
    objective: Objective = "eps"
    variance_share: Tensor | None = None


def target(objective: Objective, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network should put out for x_t = alpha x0 + sigma eps.

    eps: Ho et al. 2006.11239, eq. 14. v = alpha eps - sigma x0: Salimans & Ho 2202.00512, section 4.
    flow = eps - x0 = dx_t/dt: Liu et al. 2209.03003, eq. 1, with time running from data to noise.

    x0, eps: (B, ...); alpha, sigma: (B,) -> (B, ...)
    """
    if objective == "eps":
        return eps
    if objective == "x0":
        return x0
    if objective == "v":
        return per_sample(alpha, x0) * eps - per_sample(sigma, x0) * x0
    if objective == "flow":
        return eps - x0
    raise _unknown(objective)


def to_x0_eps(objective: Objective, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """The inverse of `target`, given x_t = alpha x0 + sigma eps.

    Where alpha = 0 (flow at t = 1), eps leaves x0 open: it is then 0, the mean of normalised data.

    output, x_t: (B, ...); alpha, sigma: (B,)
    """
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    if objective == "eps":
        return Prediction(torch.where(alpha > 0, (x_t - sigma * output) / alpha, 0.0), output, "eps")
    if objective == "x0":
        return Prediction(output, (x_t - alpha * output) / sigma, "x0")
    if objective == "v":
        return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output, "v")
    if objective == "flow":
        return Prediction(x_t - sigma * output, x_t + alpha * output, "flow")
    raise _unknown(objective)


def loss_weight(objective: Objective, snr: Tensor, min_snr_gamma: float | None) -> Tensor:
    """(B,) weight of each sample's squared error in the objective's own terms.

    min-SNR (Hang et al. 2303.09556, section 3.4) weighs the error in x0 by min(SNR, gamma). An error in the
    output is one in x0 scaled by sigma/alpha for eps and by sigma for v and flow, so its weight is
    min(SNR, gamma) times that squared: 1/SNR for eps, sigma^2 = 1/(SNR + 1) for v (variance preserving) and
    sigma^2 = 1/(sqrt(SNR) + 1)^2 for flow (alpha + sigma = 1). Without gamma every weight is 1.

    snr: (B,) alpha^2 / sigma^2, from 0 to infinity
    """
    if min_snr_gamma is None:
        return torch.ones_like(snr)
    clipped = snr.clamp(max=min_snr_gamma)
    if objective == "eps":
        return (min_snr_gamma / snr).clamp(max=1)  # clipped / snr, without 0/0
    if objective == "x0":
        return clipped
    if objective == "v":
        return clipped / (snr + 1)
    if objective == "flow":
        return clipped / (snr.sqrt() + 1) ** 2
    raise _unknown(objective)


def loss_by_time(losses: Tensor, t: Tensor, schedule: Schedule) -> dict[str, Tensor]:
    """(2,) for each quarter of the schedule's time, from data (0) to noise (100): the sum of the losses of the samples
    that fell into it, and their number. Logged as means, on which a quarter without samples has no say.

    losses: (B,); t: (B,) times of the schedule
    """
    quarter = (schedule.model_time(t) * (4 / schedule.num_train_steps)).long().clamp(max=3)
    losses = widened(losses.detach())
    each = torch.stack([losses, torch.ones_like(losses)], dim=1)
    sums = each.new_zeros(4, 2).index_add(0, quarter, each)
    return {f"loss_time_{25 * i}_{25 * i + 25}": sums[i] for i in range(4)}


def difference_error(error: Tensor) -> Tensor:
    """(B, C, H, W) error of x0 -> (B,) the mean square of its differences between neighbours along rows, plus that
    along columns.

    An error of spatial frequency (a, b) counts by 4 sin^2(a / 2) + 4 sin^2(b / 2): pictures have little power in fine
    detail (about 1 / f^2), and of a plain squared error the outlines are a few percent. Like any positive definite
    square of the error it is least at the mean of x0 given x_t, so that samplers stay what they are.
    """
    rows, columns = error.diff(dim=2), error.diff(dim=3)
    return rows.square().flatten(1).mean(1) + columns.square().flatten(1).mean(1)


def _unknown(objective: str) -> ValueError:
    return ValueError(f"objective is {objective!r}; allowed: {', '.join(get_args(Objective))}.")
