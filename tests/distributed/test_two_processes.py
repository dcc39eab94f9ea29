"""Two processes with batch 4 train what one process with batch 8 trains."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import as_torchrun
import pytest
import torch

from t2i.training import state_folder

# In float64, where rounding, which differs with the processor and the split of a batch, stays far below the
# tolerance. Without warm-up, so that four steps move the weights far more than that.
SHARED = [
    "trainer.precision=64-true",
    "trainer.num_images=32",
    "optimizer.warmup_images=0",
    "logger.tensorboard=false",
    "name=run",
]
TWO = ["trainer.batch_size=4", "trainer.devices=2", "trainer.accelerator=cpu"]
MICRO = ["trainer.micro_batches=2"]


@pytest.fixture
def autoencoder(compose_run, train, tmp_path) -> Path:
    """For the generator to build on."""
    config = compose_run("experiment=autoencoder/tiny_kl", "trainer.num_images=16", f"runs_dir={tmp_path}")
    return train(config).folder


def train_by_command(arguments: list[str], folder: Path) -> str:
    """`t2i train` in a process of its own, called in `folder`; returns what it printed."""
    command = [sys.executable, "-m", "t2i_cli.main", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def worker(rank: int, port: int, typed: list[str]) -> None:
    as_torchrun.train(rank, port, typed)


def column(folder: Path, name: str) -> torch.Tensor:
    with (folder / "metrics.csv").open(newline="") as file:
        return torch.tensor([float(row[name]) for row in csv.DictReader(file)], dtype=torch.float64)


def check_two_equal_one(
    arguments: list[str],
    means: list[str],
    compose_run,
    train,
    shapes_overrides: list[str],
    folder: Path,
    of_two: Sequence[str] = (),
) -> None:
    """of_two: what only the two processes are told"""
    one = train(compose_run(*arguments, *SHARED, f"runs_dir={folder / 'one'}")).folder
    typed = [*shapes_overrides, *arguments, *SHARED, *TWO, *of_two, f"runs_dir={folder / 'two'}"]
    as_torchrun.together(worker, (as_torchrun.free_ports(1)[0], typed))
    two = folder / "two" / one.parent.name / "run"

    assert column(two, "images").tolist() == [8, 16, 24, 32]
    for name in means:
        assert_close(column(two, name), column(one, name), name, rtol=1e-9, atol=0)
    saved = [state_folder.weights(run / "checkpoints" / "step_0000004")[0] for run in (one, two)]
    assert saved[0].keys() == saved[1].keys()
    for name, expected in saved[0].items():
        assert expected.dtype in (torch.float64, torch.int64), name
        assert_close(saved[1][name], expected, name, rtol=0, atol=1e-9)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("strategy", ["ddp", "shard_grad_op"])
def test_autoencoder_and_discriminator(strategy, compose_run, train, shapes_overrides, tmp_path):
    """With so narrow a bottleneck that real and decoded pictures differ well. Where they hardly do, their
    gradients in the discriminator cancel to rounding errors, and Adam makes whole steps of those."""
    check_two_equal_one(
        ["experiment=autoencoder/tiny_kl", "backbone.latent_channels=2", "adversarial.start_images=0"],
        [
            "loss",
            "l1",
            "kl",
            "generator",
            "discriminator",
            "adaptive_weight",
            "gradient_norm",
            "gradient_norm_1",
        ],
        *(compose_run, train, shapes_overrides, tmp_path),
        of_two=[f"trainer.strategy={strategy}"],
    )


@pytest.mark.parametrize("strategy", ["ddp", "full_shard"])
def test_generator_and_text_encoder(strategy, autoencoder, compose_run, train, shapes_overrides, tmp_path):
    """Each process in two micro-batches."""
    check_two_equal_one(
        ["experiment=latent_diffusion/tiny_dit_flow", f"builds_on.codec={autoencoder}"],
        ["loss", "gradient_norm"],
        *(compose_run, train, shapes_overrides, tmp_path),
        of_two=[*MICRO, f"trainer.strategy={strategy}"],
    )


@pytest.mark.parametrize("strategy", ["ddp", "full_shard"])
def test_two_turns_run_in_two_processes(strategy, shapes_overrides, tmp_path):
    """Each turn leaves the parameters of the other without gradients, which DDP has to be told. Numbers cannot be those
    of one process: wrong captions and batch norm's statistics are those of a process's own batch."""
    arguments = ["experiment=gan_int_cls/tiny_r1", *SHARED, *TWO, *MICRO, f"trainer.strategy={strategy}"]
    arguments += [*shapes_overrides, f"runs_dir={tmp_path / 'two'}"]
    run = tmp_path / "two" / "gan_int_cls" / "run"
    if strategy == "ddp":  # the command starts both
        called_in = tmp_path / "empty"
        called_in.mkdir()
        assert train_by_command(arguments, called_in).count("Done:") == 1
        assert list(called_in.iterdir()) == []
    else:
        as_torchrun.together(worker, (as_torchrun.free_ports(1)[0], arguments))
    assert sorted(path.name for path in run.parent.iterdir()) == ["latest", "run"]
    for name in ("discriminator", "generator", "gradient_norm_discriminator", "gradient_norm_generator"):
        assert column(run, name).isfinite().all(), name
        assert len(set(column(run, name).tolist())) == 4, name
