"""Processes that torchrun starts are one run: one folder, one voice, as many as were started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from as_torchrun import free_ports, together

RUN = ["experiment=autoencoder/tiny_kl", "trainer.accelerator=cpu", "logger.tensorboard=false", "name=run"]
RUN += ["trainer.batch_size=4", "trainer.log_every_steps=1"]


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={folder / 'logs'}", "-m", "t2i_cli.main", "train", *RUN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def test_start_and_restart_are_one_command(tmp_path, shapes_overrides):
    arguments = [*shapes_overrides, "resume=auto", "trainer.num_images=32"]
    first = torchrun(tmp_path, *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    parent = tmp_path / "runs" / "autoencoder"
    assert sorted(path.name for path in parent.iterdir()) == ["latest", "run"]
    assert first.stdout.count("Done: runs/autoencoder/run (32 images") == 1
    assert len((parent / "run" / "metrics.csv").read_text().splitlines()) == 1 + 4  # of 8 images each
    again = torchrun(tmp_path, *arguments[:-1], "trainer.num_images=48")
    assert again.returncode == 0, again.stdout + again.stderr
    assert sorted(path.name for path in parent.iterdir()) == ["latest", "run"]
    assert again.stdout.count("Done: runs/autoencoder/run (48 images") == 1
    assert len((parent / "run" / "metrics.csv").read_text().splitlines()) == 1 + 6


def test_what_is_wrong_is_said_once(tmp_path, shapes_overrides):
    done = torchrun(tmp_path, *shapes_overrides, "trainer.num_images=32", f"resume={tmp_path}")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("t2i train")]
    assert said == [f"t2i train: {tmp_path} holds no checkpoint to resume from (checkpoints/step_*)."]
    assert list(tmp_path.rglob("config.yaml")) == []


@pytest.mark.slow
def test_another_number_of_processes_is_said_once(tmp_path, shapes_overrides):
    done = torchrun(tmp_path, *shapes_overrides, "trainer.num_images=32", "trainer.devices=4")
    said = [line for line in done.stderr.splitlines() if line.startswith("t2i train: ")]
    assert said == ["t2i train: trainer.devices is 4; allowed: 2, as many processes were started."]
    assert list(tmp_path.rglob("config.yaml")) == []


def meet_with_gpus(rank: int, port: int) -> None:
    """As where there are GPUs, whose tensors go by another backend than the host's. It is pretended, by gloo."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    from t2i.launch import processes

    begin, placed = dist.init_process_group, list[torch.device]()

    def refused(*args: Any, **options: Any) -> None:  # as torch before 2.15 does
        if dist.get_backend() != "gloo":
            raise ValueError("monitored_barrier is only implemented for GLOO backend.")

    dist.monitored_barrier = refused
    dist.init_process_group = lambda backend, **how: begin(backend.replace("cuda:nccl", "cuda:gloo"), **how)
    torch.cuda.is_available, torch.cuda.device_count, torch.cuda.set_device = (
        lambda: True,
        lambda: 2,
        placed.append,
    )
    processes.join(os.environ, 60.0)
    assert placed == [torch.device("cuda", rank)]
    assert dist.get_backend() == "cpu:gloo,cuda:gloo"
    assert processes.from_first(lambda: f"of {rank}") == "of 0"
    processes.leave()


def test_processes_with_gpus_meet():
    together(meet_with_gpus, (*free_ports(1),))
