"""Processes that torchrun starts are one run: one folder, one voice, as many as were started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = ["experiment=autoencoder/tiny_kl", "trainer.accelerator=cpu", "logger.tensorboard=false", "name=run"]
RUN += ["trainer.batch_size=4", "trainer.log_every_steps=1"]


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "t2i_cli.main", "train", *RUN, *arguments]
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
