"""The loss of held-out pictures at fixed times with fixed noise, while training, and the weights that had the lowest.

A training loss is so noisy that it hides what was learned; at fixed times and noise it follows quality closely (Esser
et al., 2403.03206, section 5.3). Times are equidistant in the uniform number that a schedule makes them of: the mean is
over the times that the run trains at.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from t2i.config import RunConfig, check, run_to_dict
from t2i.data.reader import read_all
from t2i.interfaces import Batch
from t2i.launch.watch import doing
from t2i.training.callbacks import crossed, looking, mean_over_processes
from t2i.training.checkpoint import number_in_header, save_final
from t2i.training.divided import whole
from t2i.training.randomness import Randomness
from t2i.training.stage import BaseStage

log = logging.getLogger(__name__)

TIMES = 8
MOST_PICTURES = 512  # over all processes
BEST_WEIGHTS = "best.safetensors"
SEED = 0  # of the noise: the same in all runs


class AtTime(Randomness):
    """Draws the middle of the `number`-th of TIMES equal parts of [0, 1) where a time is asked for, and else what
    belongs to the picture, always the same."""

    def __init__(self, number: int, position: Tensor, dtype: torch.dtype) -> None:
        super().__init__(SEED, position, dtype)
        self.time = (number + 0.5) / TIMES

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        drawn = super().uniform(purpose, *shape)
        return torch.full_like(drawn, self.time) if purpose == "time" else drawn


def validation_losses(stage: BaseStage, parts: Sequence[Batch]) -> list[Tensor]:
    """The loss of the first turn at each of TIMES, () each, its mean over parts of one size."""
    turn = stage.all_turns[0].name
    return [
        torch.stack(
            [
                stage.losses(turn, part, AtTime(number, part.position, stage.weight_dtype))["loss"]
                for part in parts
            ]
        ).mean()
        for number in range(TIMES)
    ]


def heldout_batch(config: RunConfig, stage: BaseStage) -> Batch:
    """What is validated on. Raises ConfigError for a stage whose loss has no times, and where nothing is held out."""
    every = config.trainer.validate_every_images
    key = "trainer.validate_every_images"
    check(stage.has_times, key, every, f"0 for stage={config.stage}, whose loss is at no time")
    shards, first = config.data.heldout_shards, next(iter(config.data.parts().values()))
    check(bool(shards), key, every, "0 where data.heldout_shards is null")
    return read_all(first, shards, config.resolution.size_px, MOST_PICTURES, allow_pipes=True)


class Validation(Callback):
    """Every trainer.validate_every_images and at the end: logs validation_loss, its mean over the times, and
    validation_loss_time_0 to _7, all with the averaged weights; where it is the lowest so far these are written to
    best.safetensors. Each process takes its share of the pictures."""

    def __init__(self, folder: Path, batch: Batch) -> None:
        self.best_weights, self.batch = folder / BEST_WEIGHTS, batch
        self.lowest = number_in_header(self.best_weights, "validation_loss")

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        every = stage.config.trainer.validate_every_images
        if stage.is_complete or crossed(stage.images_seen, stage.images_per_step, every):
            self.validate(trainer, stage)

    def validate(self, trainer: L.Trainer, stage: BaseStage) -> None:
        """Measures, logs, and keeps the weights where they are the best so far."""
        doing("validates")
        with looking(trainer, stage):
            found = validation_losses(stage, self.parts(stage, trainer.global_rank, trainer.world_size))
        by_time = {f"validation_loss_time_{number}": value for number, value in enumerate(found)}
        values = mean_over_processes({"validation_loss": torch.stack(found).mean(), **by_time})
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics({"images": stage.images_seen, **values}, step=stage.steps_done)
        loss = values["validation_loss"]
        if self.lowest is None or loss < self.lowest:
            self.lowest = loss
            weights = {name: whole(value) for name, value in stage.inference_weights().items()}
            if trainer.is_global_zero:
                header = {
                    "config": run_to_dict(stage.config),
                    "extra": stage.checkpoint_extra(),
                    "images_seen": stage.images_seen,
                    "validation_loss": loss,
                }
                save_final(weights, header, self.best_weights)
        log.info(
            "validation loss %.5f after %d images; the lowest is %.5f", loss, stage.images_seen, self.lowest
        )

    def parts(self, stage: BaseStage, rank: int, world: int) -> list[Batch]:
        """This process's pictures, in parts of one size, as many as in every other process."""
        size = max(1, min(stage.config.trainer.images_at_a_time, len(self.batch) // world))
        number = max(1, len(self.batch) // (size * world))
        chosen = [[rank + world * (i * size + j) for j in range(size)] for i in range(number)]
        return [
            self.batch.rows([row % len(self.batch) for row in rows]).to(stage.device, stage.weight_dtype)
            for rows in chosen
        ]
