"""A run goes on at another strategy or number of processes from where it was: FSDP from its own checkpoint to the bit,
all others in float64 to what rounding leaves."""

from __future__ import annotations

import shutil
from pathlib import Path

import as_torchrun
import pytest
import torch
from safetensors.torch import load_file

ARGUMENTS = ["trainer.precision=64-true", "trainer.num_images=32", "trainer.global_batch_size=8"]
ARGUMENTS += ["trainer.checkpoint_every_images=16", "trainer.accelerator=cpu", "optimizer.warmup_images=0"]
ARGUMENTS += ["logger.tensorboard=false", "name=run"]
ARGUMENTS += ["trainer.sample_every_images=8"]  # by the averaged weights, of which nothing must be left
WHOLE = ["ddp", "full_shard"]
RESUMED = [("full_shard", "full_shard"), ("full_shard", "ddp"), ("ddp", "shard_grad_op")]


def worker(rank: int, ports: list[int], typed: list[str], folder: str) -> None:
    """The whole runs and those that go on from their middle, in `folder`."""
    names = [(of, of) for of in WHOLE] + [(f"{of} {to}", to) for of, to in RESUMED]
    for port, (name, strategy) in zip(ports, names, strict=True):
        place = Path(folder, name)
        if rank == 0 and " " in name:
            cut_short(Path(folder, name.split()[0]), place)
        asked = [f"trainer.strategy={strategy}", "trainer.devices=2", "resume=auto", f"runs_dir='{place}'"]
        as_torchrun.train(rank, port, [*typed, *asked])


def run_in(runs_dir: Path) -> Path:
    (run,) = runs_dir.glob("*/run")
    return run


def cut_short(runs_dir: Path, copy: Path) -> None:
    """A copy of a run without its last checkpoint and weights."""
    run = run_in(runs_dir)
    place = copy / run.parent.name / "run"
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("step_0000004"))
    (place / "model.safetensors").unlink()


def ends(runs_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_in(runs_dir) / "model.safetensors")


def farthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def check(experiment: str, typed: list[str], compose_run, train, shapes_overrides, folder: Path) -> None:
    typed = [f"experiment={experiment}", *typed, *ARGUMENTS]
    ports = as_torchrun.free_ports(len(WHOLE) + len(RESUMED))
    as_torchrun.together(worker, (ports, [*shapes_overrides, *typed], str(folder)))
    whole = {name: ends(folder / name) for name in WHOLE}
    saved = run_in(folder / "full_shard") / "checkpoints" / "step_0000002"
    assert len(list(saved.glob("shard_*.safetensors"))) == 2
    assert farthest(whole["full_shard"], whole["ddp"]) < 1e-9
    for of, to in RESUMED:
        moved = farthest(ends(folder / f"{of} {to}"), whole[of])
        assert moved == 0 if of == to else moved < 1e-9, (of, to)
    if "classifier" in experiment:  # it tells captions of one process's batch from one another
        return
    cut_short(folder / "full_shard", folder / "alone")
    train(compose_run(*typed, "resume=auto", "trainer.batch_size=8", f"runs_dir={folder / 'alone'}"))
    assert farthest(ends(folder / "alone"), whole["full_shard"]) < 1e-9


def test_a_transformer(compose_run, train, shapes_overrides, tmp_path):
    """With an average of its weights, a text encoder that learns, and Muon."""
    check("pixel_diffusion/tiny_flow_dit", [], compose_run, train, shapes_overrides, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["autoencoder/tiny_kl", "pixel_diffusion/tiny_linear_x0_classifier"])
def test_others(experiment, compose_run, train, shapes_overrides, tmp_path):
    """Convolutions in channels_last, a discriminator that begins to learn on the way, a step of two turns."""
    check(experiment, [], compose_run, train, shapes_overrides, tmp_path)
