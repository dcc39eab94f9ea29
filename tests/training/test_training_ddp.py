"""DistributedDataParallel in one process, which needs no other: what it reduces, and how often."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file

from t2i.training.run_folder import FINAL_WEIGHTS

ARGUMENTS = [
    "experiment=autoencoder/tiny_kl",
    "trainer.num_images=32",
    "trainer.precision=64-true",
    "ema=none",
]


@pytest.fixture
def reduced(monkeypatch) -> Iterator[list[int]]:
    """How many bytes of gradients were reduced, at each time."""
    seen: list[int] = []

    def hook(state: Any, bucket: Any) -> Any:
        seen.append(bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def strategy(config: Any, stage: Any) -> DDPStrategy:
        return DDPStrategy(process_group_backend="gloo", ddp_comm_hook=hook, gradient_as_bucket_view=True)

    monkeypatch.setattr("t2i.training.fit._strategy", strategy)
    environment = dict(os.environ)
    yield seen
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()  # of what Lightning tells the processes that it starts
    os.environ |= environment


def test_gradients_are_reduced_once_a_step_whatever_the_number_of_parts(
    reduced, compose_run, train, tmp_path
):
    folders = [
        train(
            compose_run(*ARGUMENTS, f"trainer.batch_size={size}", f"runs_dir={tmp_path / str(size)}", how)
        ).folder
        for size, how in ((8, "trainer.micro_batches=1"), (2, "trainer.global_batch_size=8"))
    ]
    whole, in_parts = reduced[: len(reduced) // 2], reduced[len(reduced) // 2 :]
    assert whole == in_parts
    assert len(whole) % 4 == 0  # steps
    one, four = (load_file(folder / FINAL_WEIGHTS) for folder in folders)
    assert one.keys() == four.keys()
