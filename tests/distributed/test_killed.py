"""A run that is killed again and again, each other time while it saves, ends in the weights of one that is not."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import as_torchrun
import pytest
import torch
from safetensors.torch import load_file

KILLS = int(os.environ.get("T2I_TEST_KILLS", "20"))  # of each stage in each way
STAGES = {
    "autoencoder": "autoencoder/tiny_kl",
    "ldm": "latent_diffusion/tiny_dit_flow",
    "pixel_diffusion": "pixel_diffusion/tiny_flow_dit",
    "gan_int_cls": "gan_int_cls/tiny_r1",
}
STEPS = 10 * (KILLS + 1)  # a life takes less than ten of them
ARGUMENTS = [
    *("trainer.accelerator=cpu", "logger.tensorboard=false", "name=run", "resume=auto"),
    *(f"trainer.num_images={8 * STEPS}", "trainer.global_batch_size=8", "trainer.log_every_steps=1"),
    "trainer.checkpoint_every_images=16",
]
# Processes that are forked from one that has imported all this already: twenty starts would be mostly that.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(as_torchrun.PRELOADED)


def started(typed: list[str], count: int) -> list[BaseProcess]:
    """The processes of one run."""
    (port,) = as_torchrun.free_ports(1)
    processes = [
        CONTEXT.Process(target=as_torchrun.train, args=(rank, port, typed, count)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def rows(run: Path) -> int:
    path = run / "metrics.csv"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def is_saving(run: Path) -> bool:
    """A folder that is not renamed yet, or not marked."""
    return any((run / "checkpoints").glob(".*.unfinished")) or any(
        not (path / "complete.json").is_file() for path in (run / "checkpoints").glob("step_*")
    )


def killed(processes: list[BaseProcess], run: Path, chance: random.Random, saving: bool) -> bool:
    """Kills one of them a few steps on: while it saves, or at any time. Returns whether a save was in progress. The
    others end by themselves, as they hear nothing any more."""
    until, goal = time.monotonic() + 240, rows(run) + chance.randrange(1, 5)
    while rows(run) < goal:
        assert time.monotonic() < until
        assert all(process.is_alive() for process in processes)
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.02))
    while saving and not is_saving(run):
        assert time.monotonic() < until
        assert all(process.is_alive() for process in processes)
        time.sleep(0.0002)
    unlucky = processes[chance.randrange(len(processes))]
    unlucky.kill()
    unlucky.join(60)
    assert unlucky.exitcode == -signal.SIGKILL
    within = is_saving(run)
    for process in processes:
        process.join(120)
        assert process.exitcode
    return within


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "full_shard")], ids=["alone", "ddp", "full_shard"]
)
@pytest.mark.parametrize("stage", STAGES)
def test_kills_leave_no_trace(stage, processes, strategy, shapes_overrides, tiny_kl, tmp_path):
    typed = [*shapes_overrides, f"experiment={STAGES[stage]}", *ARGUMENTS, f"trainer.strategy={strategy}"]
    if stage == "ldm":
        typed.append(f"builds_on.codec={tiny_kl}")
    ends, within = [], 0
    for name, kills in (("whole", 0), ("killed", KILLS)):
        run = tmp_path / name / stage / "run"
        chance = random.Random(0)
        of_run = [*typed, f"runs_dir={tmp_path / name}"]
        for number in range(kills):
            within += killed(started(of_run, processes), run, chance, saving=number % 2 == 1)
        last = started(of_run, processes)
        for process in last:
            process.join(600)
        assert [process.exitcode for process in last] == [0] * processes
        left = [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step_")]
        assert left == []
        assert rows(run) == 1 + STEPS
        ends.append(load_file(run / "model.safetensors"))
    assert within
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []
    print(f"{KILLS} kills of {stage}, {processes} x {strategy}: {within} while it saved")
