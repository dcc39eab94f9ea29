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
from t2i.training.adamw import AdamW
from t2i.training.divided import group_of, own

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


def orthogonalise_divided(own_rows: Tensor, rows: int, group: dist.ProcessGroup) -> Tensor:
    """The same, where each process of the group holds some rows of each matrix, the first the first ceil(rows / world):
    (N, own rows, columns) -> (N, own rows, columns). Each gets whole matrices, its share of the N, from the others, and
    gives them the rows back."""
    world = dist.get_world_size(group)
    count, held, columns = own_rows.shape
    share, most = math.ceil(count / world), math.ceil(rows / world)
    # (process, its matrices, rows of this process, columns): so that all give the same number
    given = own_rows.new_zeros(world * share, most, columns)
    given[:count, :held] = own_rows
    got = torch.empty_like(given)
    dist.all_to_all_single(got, given, group=group)
    matrices = got.view(world, share, most, columns).transpose(0, 1).reshape(share, world * most, columns)
    steps = orthogonalise(matrices[:, :rows])
    back = steps.new_zeros(share, world * most, columns)
    back[:, :rows] = steps
    back = back.view(share, world, most, columns).transpose(0, 1).contiguous()
    got = torch.empty_like(back)
    dist.all_to_all_single(got, back, group=group)
    return got.view(world * share, most, columns)[:count, :held]


class MuonAdamW(AdamW):
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
            gradient = own(parameter.grad)
            momentum = own(state["momentum"]).lerp(gradient, 1 - MOMENTUM)
            nesterov = gradient.lerp(momentum, MOMENTUM).flatten(1)
            self._take(own(state["momentum"]), momentum)
            same_shape[parameter.shape[0], nesterov.shape[1]].append((parameter, nesterov))
            parameter.grad = None
        for (rows, columns), pairs in same_shape.items():
            together = torch.stack([step for _, step in pairs])
            processes = group_of([parameter for parameter, _ in pairs])
            steps = (
                orthogonalise_together(together)
                if processes is None
                else orthogonalise_divided(together, rows, processes)
            )
            for (parameter, _), step in zip(pairs, steps, strict=True):
                scale = 0.2 * max(rows, columns) ** 0.5
                held = own(parameter.detach())
                stepped = held * (1 - group["lr"] * group["weight_decay"])
                stepped.sub_(step.to(held.dtype).reshape(held.shape), alpha=group["lr"] * scale)
                self._take(held, stepped)

    def _take(self, old: Tensor, new: Tensor) -> None:
        """Writes `new` over `old`, unless the step is left out; without a branch on what the device holds."""
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))
