"""Jobs on many processes without any communication: each takes its own shards, so that none waits for another."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from t2i.errors import ConfigError


@dataclass(frozen=True)
class Rank:
    """This process takes the shards i with i % world == rank. local: its number on the machine"""

    rank: int = 0
    world: int = 1
    local: int = 0


def rank_of(environment: Mapping[str, str]) -> Rank:
    """As torchrun or srun says. Raises ConfigError for values that are no numbers."""
    if {"RANK", "WORLD_SIZE"} <= environment.keys():
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif {"SLURM_PROCID", "SLURM_NTASKS"} <= environment.keys():
        if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
            return Rank()  # the script that sbatch runs: one process, whatever number of tasks the job has
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        return Rank()
    try:
        return Rank(*(int(environment.get(name, "0")) for name in names))
    except ValueError as error:
        raise ConfigError(f"{', '.join(names)}: {error}; allowed: whole numbers.") from error


def leave_interrupts() -> None:
    """For processes that work for this one: Ctrl-C, which reaches them too, is for it alone to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
