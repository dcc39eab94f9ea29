"""The processes of a run that torchrun or srun started: how they find one another, and agree."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, MutableMapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group

from t2i.errors import ConfigError, SaidByFirst
from t2i.launch.ranks import Rank, rank_of
from t2i.launch.watch import Watch, doing, patience_s

T = TypeVar("T")
PORTS = range(20_000, 40_000)  # below those that systems hand out
_watch: Watch | None = None


def join(environment: MutableMapping[str, str], deadline_s: float) -> Rank:
    """Connects this process to the others of its run, and tells which one it is. Alone, or where it is Lightning that
    starts the others, nothing is done.

    deadline_s: a process that does not come, or later keeps the others waiting for so long, ends the run
    Raises ConfigError where the variables of torchrun or srun are not complete.
    """
    rank = rank_of(environment)
    if rank.world == 1 or dist.is_initialized():
        return rank
    if "RANK" not in environment:  # srun: the same variables as torchrun sets
        host = environment.get("MASTER_ADDR") or _first_host(environment)
        job = int(re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or 0)
        port = environment.get("MASTER_PORT") or str(PORTS[job % len(PORTS)])
        environment.update({"MASTER_ADDR": host, "MASTER_PORT": port})
        environment.update({"RANK": str(rank.rank), "WORLD_SIZE": str(rank.world)})
        environment.update({"LOCAL_RANK": str(rank.local), "LOCAL_WORLD_SIZE": str(rank.local_world)})
    own_device(rank)
    # Tensors of the host, as those of agreements and checkpoints, go by gloo.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience_s(deadline_s)))
        # Says who did not come. dist.monitored_barrier takes no group that has NCCL beside gloo, before torch 2.15.
        everyone: Any = _get_default_group()  # whose stubs do not know
        everyone.monitored_barrier(timedelta(seconds=deadline_s), wait_all_ranks=False)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Process {rank.rank} of {rank.world} does not find the others at {environment.get('MASTER_ADDR')}:"
            f"{environment.get('MASTER_PORT')}: {' '.join(str(error).split())[:300]}"
        ) from error
    watch_over(environment, rank, deadline_s)
    return rank


def watch_over(
    environment: MutableMapping[str, str],
    rank: Rank,
    deadline_s: float,
    children: Sequence[subprocess.Popen[Any]] = (),
) -> None:
    """From now on a process that keeps the others waiting for `deadline_s` ends the run, and is named. Nothing is done
    where that is so already.

    children: of the run's processes, those that this one started
    """
    global _watch
    if _watch is None:
        _watch = Watch.begun(environment, rank, deadline_s, children)


def own_device(rank: Rank) -> torch.device:
    """The GPU of this process, from now on torch's current one, or the CPU where there is none. Where each process is
    shown no GPU but its own, that has the number 0 in all of them."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank.local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def is_joined() -> bool:
    """Whether `join` connected this process to others."""
    return dist.is_initialized()


def leave() -> None:
    """Ends what `join` and `watch_over` began."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them. Where it raises there, the others raise SaidByFirst."""
    if not dist.is_initialized():
        return make()
    answer: list[Any] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer = [(True, make())]
        except Exception as error:
            failure, answer = error, [(False, str(error))]
    doing("hears what the first process found")
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    good, value = answer[0]
    if not good:
        raise SaidByFirst(value)
    return value


def _first_host(environment: MutableMapping[str, str]) -> str:
    """Raises ConfigError where SLURM does not say which machines there are."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError(
            "MASTER_ADDR is not set, and SLURM_JOB_NODELIST neither; allowed: the first machine's name."
        )
    if not re.search(r"[\[,]", nodes):
        return nodes
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60
        )
        return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set, and scontrol does not say which machines {nodes} are: {error}"
        ) from error
