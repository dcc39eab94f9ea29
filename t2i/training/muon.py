"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum steps made orthogonal.

torch.optim.Muon steps one matrix at a time and takes no convolutions; small models spend more time in its many
small products than in the model. Here matrices of one shape are stepped together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from t2i.nn.precision import widened

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that pulls singular values towards 1
NUM_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """(N, rows, columns) float -> the same shape, bfloat16 (on a CPU and in float64 as it is), each U V^T of its
    singular value decomposition but for singular values from about 0.7 to 1.2: Newton-Schulz iterations, which need
    products only."""
    a, b, c = COEFFICIENTS
    # Many CPUs have no units for bfloat16: there the products took seven times as long.
    exact = matrices.device.type == "cpu" or matrices.dtype == torch.float64
    x = widened(matrices) if exact else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, gram, x, beta=a)  # a x + gram x
    return x.mT if tall else x


def orthogonalise_together(matrices: Tensor) -> Tensor:
    """The same, where several processes hold the same matrices: each computes its share of them and gets the others'.
    All then have the same bits."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalise(matrices)
    count, share = len(matrices), math.ceil(len(matrices) / world)
    first = dist.get_rank() * share
    own = matrices[first : first + share]
    missing = own.new_zeros(share - len(own), *own.shape[1:])  # so that all give the same number
    steps = orthogonalise(torch.cat([own, missing])).contiguous()
    gathered = steps.new_empty(share * world, *steps.shape[1:])
    dist.all_gather_into_tensor(gathered, steps)
    return gathered[:count]


class MuonAdamW(torch.optim.AdamW):
    """Muon for the parameter groups that have `muon` true, AdamW for the others.

    Convolutions are stepped as matrices (out_channels, everything else). A step has the root mean square
    0.2 * lr that AdamW's steps have (Liu et al. 2502.16982, eq. 4). Processes share the work. After a step, Muon's
    parameters have no gradient any more. Where `found_inf` is set to a tensor that is 1, a step changes nothing, as in
    AdamW.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._step_muon(group)
        super().step()  # passes over parameters without gradient
        return loss

    def _step_muon(self, group: dict[str, Any]) -> None:
        same_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.tensor(0.0)  # AdamW looks for it when a checkpoint is loaded
            momentum = state["momentum"].lerp(parameter.grad, 1 - MOMENTUM)
            nesterov = parameter.grad.lerp(momentum, MOMENTUM).flatten(1)
            self._take(state["momentum"], momentum)
            same_shape[nesterov.shape].append((parameter, nesterov))
            parameter.grad = None
        for (rows, columns), pairs in same_shape.items():
            steps = orthogonalise_together(torch.stack([step for _, step in pairs]))
            for (parameter, _), step in zip(pairs, steps, strict=True):
                scale = 0.2 * max(rows, columns) ** 0.5
                stepped = parameter * (1 - group["lr"] * group["weight_decay"])
                stepped.sub_(step.to(parameter.dtype).reshape(parameter.shape), alpha=group["lr"] * scale)
                self._take(parameter, stepped)

    def _take(self, old: Tensor, new: Tensor) -> None:
        """Writes `new` over `old`, unless the step is left out; without a branch on what the device holds."""
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))
