"""Which process of a job this one is, from the environment, however it was started: by torchrun, by srun, by Lightning
or by hand. Nothing is imported or asked that another process would have to answer."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass

from t2i.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """rank: number of this process among the `world` processes of the job, from 0
    local: its number among the `local_world` processes on its machine
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def machines(self) -> int:
        return self.world // self.local_world


ALONE = Rank()


def rank_of(environment: Mapping[str, str]) -> Rank:
    """Of a process that torchrun or srun started; any other is the only one. Raises ConfigError for values that are no
    numbers."""
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_world = _number(environment, "LOCAL_WORLD_SIZE") or 1
    elif in_step(environment):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        local_world = _tasks_of_node(environment)
    else:
        return ALONE
    rank, world, local = (_number(environment, name) for name in names)
    if not 0 <= rank < world:
        raise ConfigError(f"{names[0]} is {rank}; allowed: from 0, below {names[1]}, which is {world}.")
    if world % local_world:
        raise ConfigError(
            f"{world} processes were started, {local_world} of them on this machine; allowed: the same number on each."
        )
    return Rank(rank, world, local, local_world)


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process speaks for all of the job. Further processes that Lightning starts for a run have
    LOCAL_RANK and NODE_RANK, and not RANK; within a step of SLURM they have the SLURM_PROCID of the one that started
    them. Raises ConfigError for values that are no numbers."""
    if "RANK" in environment:
        return _number(environment, "RANK") == 0
    names = ("SLURM_PROCID",) if in_step(environment) else ()
    return not any(_number(environment, name) for name in ("LOCAL_RANK", "NODE_RANK", *names))


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether torchrun or srun started this process, alone or with others."""
    return {"RANK", "WORLD_SIZE"} <= environment.keys() or in_step(environment)


def name_of(environment: Mapping[str, str]) -> str:
    """Of a process that is not the first: "process 5 on node2"."""
    rank = rank_of(environment).rank or _number(environment, "LOCAL_RANK")
    return f"process {rank} on {platform.node()}"


def job_name(environment: Mapping[str, str]) -> str | None:
    """What the cluster calls this job, the same in each of its processes; None where there is no cluster."""
    return environment.get("SLURM_JOB_ID") or None


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. The script that sbatch runs is one process, whatever number of tasks its job
    has."""
    in_script = "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment
    return {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys() and not in_script


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Of "2(x3),1", which counts the tasks of nodes in their order, that of this node; 1 where SLURM does not say."""
    node = _number(environment, "SLURM_NODEID")
    given = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", given)
        for _ in range(int(times or 1))
    ]
    return counts[node] if node < len(counts) else 1


def _number(environment: Mapping[str, str], name: str) -> int:
    """0 where it is absent or empty."""
    value = environment.get(name) or "0"
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{name} is {value!r}; allowed: whole numbers.") from error
