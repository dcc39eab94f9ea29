"""A run that is killed again and again, some times while it saves, ends in the weights of one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from as_torchrun import free_ports
from safetensors.torch import load_file

KILLS = 20
ARGUMENTS = ["trainer.accelerator=cpu", "logger.tensorboard=false", "name=run", "resume=auto"]
ARGUMENTS += ["trainer.batch_size=8", "trainer.num_images=4800", "trainer.checkpoint_every_images=16"]
ARGUMENTS += ["trainer.log_every_steps=1"]
TOGETHER = [*ARGUMENTS, "trainer.batch_size=4", "trainer.num_images=800"]


def started(folder: Path, data: list[str], experiment: str, more: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "t2i_cli.main", "train", f"experiment={experiment}", *data, *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def started_together(
    folder: Path, data: list[str], experiment: str, more: list[str]
) -> list[subprocess.Popen[bytes]]:
    """Two processes of one run, as torchrun would start them."""
    (port,) = free_ports(1)
    processes = []
    for rank in range(2):
        said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        with patch.dict(os.environ, {name: str(value) for name, value in said.items()}):
            processes.append(started(folder, data, experiment, more))
    return processes


def rows(run: Path) -> int:
    path = run / "metrics.csv"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "pixel_diffusion"])
def test_twenty_kills_leave_no_trace(tmp_path, shapes_overrides, stage):
    experiment = {"autoencoder": "autoencoder/tiny_kl", "pixel_diffusion": "pixel_diffusion/tiny_flow_dit"}[
        stage
    ]
    ends = []
    for name, kills in (("whole", 0), ("killed", KILLS)):
        folder = tmp_path / name
        folder.mkdir()
        run = folder / "runs" / stage / "run"
        chance = random.Random(0)
        for _ in range(kills):
            before = rows(run)
            with started(folder, shapes_overrides, experiment, ARGUMENTS) as process:
                until = time.monotonic() + 120
                while rows(run) <= before and process.poll() is None:  # it has come further
                    assert time.monotonic() < until
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 0.5))
                process.send_signal(signal.SIGKILL)
        with started(folder, shapes_overrides, experiment, ARGUMENTS) as process:
            _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
        assert [
            path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step_")
        ] == []
        assert rows(run) == 1 + 600
        ends.append(load_file(run / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "full_shard"])
def test_kills_of_one_of_two_processes_leave_no_trace(tmp_path, shapes_overrides, strategy):
    """The other one ends by itself, as it hears nothing any more."""
    experiment, ends = "pixel_diffusion/tiny_flow_dit", []
    more = [*TOGETHER, f"trainer.strategy={strategy}"]
    for name, kills in (("whole", 0), ("killed", KILLS)):
        folder = tmp_path / name
        folder.mkdir()
        run = folder / "runs" / "pixel_diffusion" / "run"
        chance = random.Random(0)
        for _ in range(kills):
            before = rows(run)
            processes = started_together(folder, shapes_overrides, experiment, more)
            until = time.monotonic() + 240
            while rows(run) <= before and all(process.poll() is None for process in processes):
                assert time.monotonic() < until
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
            processes[chance.randrange(2)].kill()
            for process in processes:
                process.communicate(timeout=120)
        processes = started_together(folder, shapes_overrides, experiment, more)
        errors = [process.communicate(timeout=600)[1].decode() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
        left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith("step_")]
        assert left == []
        assert rows(run) == 1 + 100
        ends.append(load_file(run / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []
