"""Steps whose gradients are not finite, and state that is not.

Whether a step is left out is decided and counted on the device; the host looks only where it waits anyway, to log or to
save.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from t2i.errors import TrainingError
from t2i.files import written_whole
from t2i.training.divided import group_of, own

MAX_IN_ROW = 3
MAX_IN_ROW_SCALED = 30  # with precision=16-mixed, whose scaler finds its scale by steps that overflow
KEPT_BATCHES = 100
REPORT = "not_finite.json"


class SkippedSteps:
    """On `device`: last: () bool, whether the last step was left out; total, in_row: () int64."""

    def __init__(self, device: torch.device, total: int = 0) -> None:
        self.last = torch.zeros((), dtype=torch.bool, device=device)
        self.total = torch.full((), total, dtype=torch.int64, device=device)
        self.in_row = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, gradient_norms: Sequence[Tensor]) -> None:
        """Counts a step by the norms of its gradients, () each. All processes have the same gradients, and so the same
        answer."""
        self.last = any_not_finite(gradient_norms).bool()
        self.total = self.total + self.last
        self.in_row = (self.in_row + 1) * self.last


def any_not_finite(norms: Sequence[Tensor]) -> Tensor:
    """() each -> () float32, 1 where one is not finite: what a fused optimizer calls found_inf."""
    return (~torch.stack([norm.isfinite() for norm in norms]).all()).float()


class BatchKeys:
    """The keys of this process's last batches, for the report on steps that were left out."""

    def __init__(self) -> None:
        self.kept: deque[tuple[int, list[str]]] = deque(maxlen=KEPT_BATCHES)

    def add(self, step: int, keys: list[str]) -> None:
        self.kept.append((step, keys))

    def write(self, folder: Path, first_step: int) -> Path:
        """not_finite.json: for each step from `first_step` on, the keys of its batch over all processes."""
        gathered: list[Any] = [list(self.kept)]
        if dist.is_initialized():
            gathered *= dist.get_world_size()
            dist.all_gather_object(gathered, list(self.kept))
        keys: dict[int, list[str]] = defaultdict(list)
        for step, of_process in (each for process in gathered for each in process):
            if step >= first_step:
                keys[step] += of_process
        path = folder / REPORT
        if not dist.is_initialized() or dist.get_rank() == 0:
            with written_whole(path) as unfinished:
                unfinished.write_text(json.dumps({"keys_by_step": keys}, indent=1, ensure_ascii=False) + "\n")
        return path


def check_before_writing(tensors: Iterable[tuple[str, Tensor]], what: Path) -> None:
    """Raises TrainingError that names the first tensor with a number that is not finite. The host waits once for
    each device. Where tensors are divided among processes, all have to ask, and all raise."""
    given = list(tensors)
    found = [_first_not_finite([(name, own(tensor)) for name, tensor in given])]
    if group_of([tensor for _, tensor in given]) is not None:
        found *= dist.get_world_size()
        dist.all_gather_object(found, found[0])
    if name := next(filter(None, found), None):
        raise TrainingError(f"{what} is not written: {name} has numbers that are not finite.")


def _first_not_finite(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """Its name; None where all are."""
    flags: dict[torch.device, list[Tensor]] = defaultdict(list)
    for _, tensor in named:
        flags[tensor.device].append(tensor.isfinite().all())
    if all(bool(torch.stack(of_device).all()) for of_device in flags.values()):
        return None
    return next(name for name, tensor in named if not tensor.isfinite().all())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """What an optimizer keeps of each parameter, by name and number."""
    states: Iterable[Mapping[str, Any]] = optimizer.state.values()
    for number, state in enumerate(states):
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield f"the optimizer's {name} of parameter {number}", value
