"""A loss that is not finite on one of two processes: both leave the step out, and the report has the keys of both."""

from __future__ import annotations

import json
from pathlib import Path

import as_torchrun
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from t2i.config import OptimizerConfig
from t2i.training.divided import whole
from t2i.training.finite import BatchKeys, SkippedSteps, any_not_finite
from t2i.training.optimizer import build_optimizer
from t2i.training.step import total_norm

STEPS = 4
SPOILT = 2  # on rank 1


def worker(rank: int, folder: str, sharded: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = nn.Linear(3, 3)
    parallel: nn.Module = (
        fully_shard(module) if sharded else DistributedDataParallel(module, gradient_as_bucket_view=True)
    )
    config = OptimizerConfig(learning_rate=0.1, muon_scale=1.0, warmup_images=0)
    optimizer = build_optimizer([module.parameters()], [module.weight], config)
    skipped, keys, seen = SkippedSteps(torch.device("cpu")), BatchKeys(), []
    for step in range(STEPS):
        keys.add(step, [f"{step}-{rank}"])
        optimizer.zero_grad()
        spoil = float("nan") if (rank, step) == (1, SPOILT) else 1.0
        (parallel(torch.full((2, 3), step + rank + 1.0)).square().mean() * spoil).backward()
        norm = total_norm([p.grad for p in module.parameters()])
        optimizer.found_inf = any_not_finite([norm])
        skipped.count([norm])
        optimizer.step()
        seen.append([bool(skipped.last), *whole(module.weight).flatten().tolist()])
    keys.write(Path(folder), SPOILT)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_both_processes_leave_the_step_out(sharded, tmp_path):
    as_torchrun.together(worker, (str(tmp_path), sharded))
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert [step[0] for step in first] == [step == SPOILT for step in range(STEPS)]
    assert first[SPOILT][1:] == first[SPOILT - 1][1:]
    assert first[SPOILT + 1][1:] != first[SPOILT][1:]
    report = json.loads((tmp_path / "not_finite.json").read_text())["keys_by_step"]
    assert report == {str(step): [f"{step}-0", f"{step}-1"] for step in range(SPOILT, STEPS)}
