"""What a run draws for held-out prompts while it trains, measured now and then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from t2i.interfaces import Batch
from t2i.launch.watch import doing
from t2i.training.callbacks import crossed, looking
from t2i.training.stage import BaseStage


@dataclass(frozen=True)
class Measure:
    """batch: whose captions are drawn; figures: pictures (N, 3, H, W) in [-1, 1] -> numbers by name, asked in the first
    process alone"""

    batch: Batch
    figures: Callable[[Tensor], dict[str, float]]


class Drawn(Callback):
    """Every trainer.evaluate_every_images and at the end, with the averaged weights: draws, measures, logs."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        every = stage.config.trainer.evaluate_every_images
        if stage.is_complete or crossed(stage.images_seen, stage.images_per_step, every):
            self.draw(trainer, stage)

    def draw(self, trainer: L.Trainer, stage: BaseStage) -> None:
        """All processes draw, since the model may be spread over them; the first measures."""
        doing("draws to measure")
        batch = self.measure.batch.to(stage.device, stage.weight_dtype)
        with looking(trainer, stage):
            images = stage.draw(batch)["samples"].float().cpu()
        if not trainer.is_global_zero:
            return
        values = {"images": stage.images_seen, **self.measure.figures(images)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=stage.steps_done)
