"""Which process speaks, and which part of the work is its own, however it was started."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from t2i.errors import ConfigError
from t2i.launch.ranks import Rank, is_first, job_name, rank_of

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
}
FIRST_OF_SRUN = {**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
# What sbatch's own script has: SLURM counts it as task 0 of 8, but there are no seven others.
SBATCH = {name: value for name, value in FIRST_OF_SRUN.items() if name != "SLURM_STEP_ID"}


def torchrun(rank: int, world: int, local: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}


@pytest.mark.parametrize(
    ("environment", "rank", "first"),
    [
        ({}, Rank(0, 1, 0), True),
        (torchrun(0, 4, 0), Rank(0, 4, 0), True),
        (torchrun(3, 4, 1), Rank(3, 4, 1), False),
        (torchrun(2, 4, 0), Rank(2, 4, 0), False),  # the first of the second machine
        (SRUN, Rank(5, 8, 1), False),
        ({**SRUN, "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, Rank(4, 8, 0), False),
        (FIRST_OF_SRUN, Rank(0, 8, 0), True),
        ({**SRUN, **torchrun(0, 2, 0)}, Rank(0, 2, 0), True),  # torchrun in a step
        ({**FIRST_OF_SRUN, **torchrun(1, 2, 1)}, Rank(1, 2, 1), False),
        (SBATCH, Rank(), True),
        ({"SLURM_JOB_ID": "7"}, Rank(), True),
        # Lightning's further processes; the first has LOCAL_RANK too, once it has started them
        ({"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": "2"}, Rank(), True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, Rank(), False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1", "WORLD_SIZE": "4"}, Rank(), False),
        ({"NODE_RANK": "1"}, Rank(), False),  # the one that is started by hand on the second machine
        ({**SBATCH, "LOCAL_RANK": "1"}, Rank(), False),
        ({**FIRST_OF_SRUN, "SLURM_NTASKS": "1", "LOCAL_RANK": "1"}, Rank(0, 1, 0), False),
        ({"LOCAL_RANK": ""}, Rank(), True),
    ],
    ids=str,
)
def test_the_rank_and_who_speaks(environment, rank, first):
    assert (rank_of(environment), is_first(environment)) == (rank, first)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_values_that_are_no_numbers(name):
    with pytest.raises(ConfigError, match=f"{name} is 'x'; allowed: whole numbers"):
        rank_of({**torchrun(1, 4, 1), name: "x"})


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_is_none_of_the_processes(rank):
    with pytest.raises(ConfigError, match=f"RANK is {rank}; allowed: from 0, below WORLD_SIZE, which is 4"):
        rank_of(torchrun(rank, 4, 0))


def test_the_job_has_the_clusters_name():
    assert (job_name({}), job_name({"SLURM_JOB_ID": ""}), job_name(SRUN)) == (None, None, "7")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "said"),
        (torchrun(0, 4, 0), "said"),
        (torchrun(2, 4, 0), ""),
        (FIRST_OF_SRUN, "said"),
        ({**SRUN, "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, ""),
        ({"LOCAL_RANK": "1"}, ""),
    ],
    ids=str,
)
def test_only_the_first_process_of_all_machines_prints(environment, said):
    code = "from t2i_cli.console import console; console.print('said')"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == said


def test_who_speaks_is_known_before_torch_is_loaded():
    code = "import sys, t2i.launch.ranks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
