"""Four processes as two machines of two: shared within each, the same on both."""

from __future__ import annotations

from pathlib import Path

import as_torchrun
import pytest
import torch
from safetensors.torch import load_file

ARGUMENTS = ["experiment=pixel_diffusion/tiny_flow_dit", "trainer.precision=64-true", "trainer.num_images=32"]
ARGUMENTS += ["trainer.global_batch_size=8", "trainer.accelerator=cpu", "optimizer.warmup_images=0"]
ARGUMENTS += ["logger.tensorboard=false", "name=run"]


def worker(rank: int, port: int, typed: list[str]) -> None:
    as_torchrun.train(rank, port, typed, world=4, machines=2)


@pytest.mark.slow
def test_two_machines_of_two_processes(compose_run, train, shapes_overrides, tmp_path):
    typed = [*shapes_overrides, *ARGUMENTS, "trainer.strategy=hybrid_shard", f"runs_dir={tmp_path / 'four'}"]
    as_torchrun.together(worker, (as_torchrun.free_ports(1)[0], typed), count=4)
    one = train(compose_run(*ARGUMENTS, f"runs_dir={tmp_path / 'one'}")).folder
    four = tmp_path / "four" / one.parent.name / "run"
    saved = four / "checkpoints" / "step_0000004"
    assert len(list(saved.glob("shard_*.safetensors"))) == 2
    ends = [load_file(folder / "model.safetensors") for folder in (one, four)]
    assert ends[0].keys() == ends[1].keys()
    for name, expected in ends[0].items():
        torch.testing.assert_close(ends[1][name], expected, rtol=0, atol=1e-9)
    # From the checkpoint of four, alone.
    (four / "model.safetensors").unlink()
    folder: Path = train(compose_run(*ARGUMENTS, "resume=auto", f"runs_dir={tmp_path / 'four'}")).folder
    for name, expected in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(ends[1][name], expected, rtol=0, atol=1e-9)
