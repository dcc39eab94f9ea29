"""bf16-mixed in two processes that share the weights: what is kept stays float32, and learns what DDP's does."""

from __future__ import annotations

import csv
from pathlib import Path

import as_torchrun
import pytest
import torch

from t2i.training import state_folder

ARGUMENTS = ["experiment=pixel_diffusion/tiny_flow_dit", "trainer.precision=bf16-mixed", "name=run"]
ARGUMENTS += ["trainer.num_images=32", "trainer.global_batch_size=8", "trainer.accelerator=cpu"]
ARGUMENTS += ["optimizer.warmup_images=0", "logger.tensorboard=false"]
STRATEGIES = ("ddp", "full_shard")


def worker(rank: int, ports: list[int], shards: list[str], folder: str) -> None:
    for port, strategy in zip(ports, STRATEGIES, strict=True):
        ways = [f"trainer.strategy={strategy}", f"runs_dir={folder}/{strategy}", "trainer.devices=2"]
        as_torchrun.train(rank, port, [*shards, *ARGUMENTS, *ways])


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_weights_are_kept_in_float32_and_learn_as_with_ddp(shapes_overrides, tmp_path):
    as_torchrun.together(worker, (as_torchrun.free_ports(2), shapes_overrides, str(tmp_path)))
    ddp, shared = (tmp_path / strategy / "pixel_diffusion" / "run" for strategy in STRATEGIES)
    found = state_folder.read(shared / "checkpoints" / "step_0000004")
    assert {value.dtype for value in found["state_dict"].values() if value.is_floating_point()} == {
        torch.float32
    }
    moments = [each for each in found["optimizer_states"][0]["state"].values() if "exp_avg" in each]
    assert moments
    assert {each["exp_avg"].dtype for each in moments} == {torch.float32}
    # bfloat16 has 8 binary digits.
    for name, rel in (("loss", 2**-7), ("gradient_norm", 2**-5)):
        assert column(shared, name) == pytest.approx(column(ddp, name), rel=rel)
