"""A run that is killed again and again, some times while it saves, ends in the weights of one that is not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KILLS = 20
ARGUMENTS = ["trainer.accelerator=cpu", "logger.tensorboard=false", "name=run", "resume=auto"]
ARGUMENTS += ["trainer.batch_size=8", "trainer.num_images=4800", "trainer.checkpoint_every_images=16"]
ARGUMENTS += ["trainer.log_every_steps=1"]


def started(folder: Path, data: list[str], experiment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "t2i_cli.main", "train", f"experiment={experiment}", *data, *ARGUMENTS]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


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
            with started(folder, shapes_overrides, experiment) as process:
                until = time.monotonic() + 120
                while rows(run) <= before and process.poll() is None:  # it has come further
                    assert time.monotonic() < until
                    time.sleep(0.02)
                time.sleep(chance.uniform(0, 0.5))
                process.send_signal(signal.SIGKILL)
        with started(folder, shapes_overrides, experiment) as process:
            _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
        assert [
            path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step_")
        ] == []
        assert rows(run) == 1 + 600
        ends.append(load_file(run / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []
