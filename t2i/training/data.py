"""The pictures of a run: the training loader, the preview batch, and a look at the first ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from t2i.config import RunConfig
from t2i.data.loader import BatchLoader, build_loader
from t2i.data.reader import read_all
from t2i.errors import CheckpointError, DataError
from t2i.interfaces import Batch
from t2i.launch.watch import doing
from t2i.training.ranges import part_of_step
from t2i.training.stage import BaseStage
from t2i.training.waits import DataWait

NUM_PREVIEW_PICTURES = 16
NUM_SOME_IMAGES = 512


class ShardData(L.LightningDataModule):
    """The training loader, started where the stage stands."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint: str | None = (
            None  # of the shards; where a run is resumed, at first those of its checkpoint
        )

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fingerprint = state_dict["fingerprint"]

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        stage = self.trainer.lightning_module
        assert isinstance(stage, BaseStage)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        loader = loader_from(self.config, rank, world, stage.images_seen)
        fingerprint = loader.fingerprint()
        _check_same_everywhere(fingerprint)
        if self.fingerprint not in (None, fingerprint) and not self.config.allow_other_shards:
            raise CheckpointError(
                "data.shards: these are not the shards that the run was trained on: their sizes or contents differ, "
                "so that it would go on with other samples; allow_other_shards=true resumes nevertheless."
            )
        self.fingerprint = fingerprint
        loader.waiting = DataWait(stage.device)
        return loader

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        assert self.trainer is not None
        stage = self.trainer.lightning_module
        assert isinstance(stage, BaseStage)
        with part_of_step("copy"):
            return batch.to(device, stage.weight_dtype)


def _check_same_everywhere(fingerprint: str) -> None:
    """Raises DataError where processes see other shards: each would then follow an order of its own."""
    if not dist.is_initialized():
        return
    doing("compares the shards")
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, fingerprint)
    if len(set(seen)) > 1:
        others = [rank for rank, each in enumerate(seen) if each != seen[0]]
        raise DataError(
            f"data.shards: processes {', '.join(map(str, others))} see other shards, or other sizes of them, than "
            "process 0; is a disk not mounted on a node, or was `t2i data index` not finished?"
        )


def loader_from(config: RunConfig, rank: int = 0, world_size: int = 1, start_images: int = 0) -> BatchLoader:
    """The batches of one process from `start_images` (over all processes) on, without end."""
    return build_loader(
        config.data,
        size_px=config.resolution.size_px,
        batch_size=config.trainer.images_per_process,
        text_dropout=config.resolution.text_dropout,
        min_original_px=config.resolution.min_original_px,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start_images=start_images,
    )


def preview_batch(config: RunConfig) -> Batch:
    """The same few pictures for every grid of a run: held-out ones where the data has them."""
    first = next(iter(config.data.parts().values()))
    shards = config.data.heldout_shards or first.shards
    return read_all(first, shards, config.resolution.size_px, NUM_PREVIEW_PICTURES, allow_pipes=True)


def some_images(config: RunConfig) -> Iterator[Tensor]:
    """Square pictures (B, 3, H, W) from the start of the training data, the same in every process, as many at a time as
    in training."""
    mixture = {name: dataclasses.replace(part, encoded=None) for name, part in config.data.mixture.items()}
    data = dataclasses.replace(config.data, mixture=mixture, encoded=None, bucket_step_px=None)
    size = config.trainer.images_at_a_time
    trainer = dataclasses.replace(config.trainer, batch_size=size, micro_batches=1, global_batch_size=None)
    loader = iter(loader_from(dataclasses.replace(config, data=data, trainer=trainer)))
    for _ in range(-(-NUM_SOME_IMAGES // size)):
        yield next(loader).to("cpu").image
