"""What a run leaves behind of its weights: checkpoints, and at the end the weights for use; never numbers that are not
finite."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from t2i.config import RunConfig, TrainerConfig, run_to_dict
from t2i.errors import TrainingError
from t2i.interfaces import Batch
from t2i.launch.watch import doing
from t2i.training import run_folder, state_folder
from t2i.training.callbacks import Pictures, crossed
from t2i.training.checkpoint import images_seen, save_final
from t2i.training.data import some_images
from t2i.training.divided import whole
from t2i.training.finite import (
    MAX_IN_ROW,
    MAX_IN_ROW_SCALED,
    BatchKeys,
    check_before_writing,
    optimizer_tensors,
)
from t2i.training.stage import BaseStage
from t2i.training.state_shards import split

log = logging.getLogger(__name__)
# A process that dies is noticed at once, one that hangs by the others' steps.
LONGEST_WRITE = timedelta(days=1)


class StateFolders(TorchCheckpointIO):
    """Lightning's checkpoints as folders that are complete or do not count.

    written: called with the folder, in the background, when it is complete, in each process that wrote
    failed: called with what the system refused, in the background, likewise; training goes on
    """

    def __init__(self, written: Callable[[Path], None], failed: Callable[[Path, OSError], None]) -> None:
        super().__init__()
        self.written, self.failed = written, failed
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._buffers: list[torch.Tensor] = []
        self._group: dist.ProcessGroup | None = None  # those that write together, in the background
        self._frozen: Path | None = None  # of the newest checkpoint: later ones link to it

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copies to the host's memory, and begins to write. Waits for the one before, if that is still written. Where
        it is divided among processes, all have to call."""
        self.wait()
        frozen = self._frozen if self._frozen is not None and self._frozen.is_file() else None
        if frozen is not None:
            checkpoint.pop("frozen", None)
        rest, shards = split(checkpoint)
        if shards is not None and self._group is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONGEST_WRITE))
        if shards is not None and dist.get_rank() > 0:
            rest = {}
        copied = state_folder.on_host((rest, shards), self._buffers)
        self._writer = threading.Thread(
            target=self._write, args=(*copied, Path(path), frozen), name="checkpoint"
        )
        self._writer.start()

    def wait(self) -> None:
        """Until all is written. Raises what went wrong with the last one, but for what `failed` was told."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def teardown(self) -> None:
        """At the end of a run, an error's too: what is being written will be there."""
        if self._writer is not None:
            self._writer.join()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only=True)
        self._frozen = Path(path) / state_folder.FROZEN
        return state_folder.read(Path(path))

    def _write(self, checkpoint: dict[str, Any], shards: Any, path: Path, frozen: Path | None) -> None:
        try:
            state_folder.write(checkpoint, path, shards, None if shards is None else self._group, frozen)
            self._frozen = path / state_folder.FROZEN
            self.written(path)
        except OSError as error:
            self.failed(path, error)
        except Exception as error:
            self._error = error


class NotFinite(Callback):
    """Ends the run when the last few steps all had to be left out, as their gradients were not finite. Looked for when
    metrics are logged or a checkpoint is due, where the host waits anyway; its place is between those two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = BatchKeys()

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.keys.add(stage.steps_done, batch.key)
        settings = stage.config.trainer
        saves = crossed(stage.images_seen, stage.images_per_step, settings.checkpoint_every_images)
        if saves or stage.is_complete or stage.steps_done % settings.log_every_steps == 0:
            self.check(stage)

    def check(self, stage: BaseStage) -> None:
        """Raises TrainingError; the keys of the batches are in not_finite.json then."""
        in_row, settings = int(stage.skipped.in_row), stage.config.trainer
        if in_row >= (MAX_IN_ROW_SCALED if settings.precision == "16-mixed" else MAX_IN_ROW):
            path = self.keys.write(self.folder, stage.steps_done - in_row + 1)
            raise TrainingError(
                f"The gradients of {in_row} steps in a row, up to step {stage.steps_done}, are not finite, so that "
                f"nothing is learned any more (optimizer.learning_rate is {stage.config.optimizer.learning_rate:g}, "
                f"trainer.precision {settings.precision}); {path} has the keys of their batches, and checkpoints of "
                "before are kept."
            )


class Checkpoints(Callback):
    """checkpoints/step_0000100/ every checkpoint_every_images. When one is complete, older ones are removed but for
    keep_checkpoints of them, and the first after each keep_every_images. The last one is written when the run is
    complete or was stopped (see `Finish`)."""

    def __init__(self, folder: Path, config: TrainerConfig) -> None:
        self.folder, self.config = folder, config
        self.saved_step: int | None = None
        self.io = StateFolders(self.written, self.failed)
        self.lost: OSError | None = None  # what kept the last one from being written

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        every = stage.config.trainer.checkpoint_every_images
        if crossed(stage.images_seen, stage.images_per_step, every) and not stage.is_complete:
            self.save(trainer, stage)

    def save(self, trainer: L.Trainer, stage: BaseStage) -> None:
        """Begins to write the present state. Raises TrainingError where it is not finite."""
        doing("saves")
        path = self.folder / "checkpoints" / f"step_{stage.steps_done:07d}"
        averages = stage.ema.state_dict() if stage.ema is not None else {}
        averaged = ((f"the average of {name}", value) for name, value in averages.items())
        moments = (pair for optimizer in trainer.optimizers for pair in optimizer_tensors(optimizer))
        state = [*stage.state_dict().items(), *averaged, *moments]
        check_before_writing(state, path)
        trainer.save_checkpoint(path)
        self.saved_step = stage.steps_done

    def finish(self) -> None:
        """Waits for the last one. Raises OSError where it could not be written."""
        self.io.wait()
        if self.lost is not None:
            raise self.lost

    def written(self, path: Path) -> None:
        """Removes what is not kept."""
        self.lost = None
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        saved, every = run_folder.checkpoints(self.folder), self.config.keep_every_images
        seen = set[int]()
        for old in saved[: -self.config.keep_checkpoints]:
            nth = run_folder.images_of(old) // every if every else 0
            if nth == 0 or nth in seen:
                state_folder.remove(old)
            seen.add(nth)

    def failed(self, path: Path, error: OSError) -> None:
        """Training goes on: there may be room for the next one, and those of before are whole."""
        self.lost = error
        log.warning("%s is not written: %s; training goes on", path, error.strerror)


class Finish(Callback):
    """The end of a run. Where it is complete: what the stage measures, last pictures, last checkpoint and, as the last
    of all, the final weights, if those of as many images are not there yet. Where it was stopped: a checkpoint."""

    def __init__(self, config: RunConfig, folder: Path, pictures: Pictures, saver: Checkpoints) -> None:
        self.config, self.folder, self.pictures, self.saver = config, folder, pictures, saver
        self.finished = images_seen(folder / run_folder.FINAL_WEIGHTS)  # before any process can write them

    def on_train_end(self, trainer: L.Trainer, stage: Any) -> None:
        if not stage.is_complete:
            if self.saver.saved_step != stage.steps_done:
                self.saver.save(trainer, stage)
            self.saver.finish()
            return
        if self.finished == stage.images_seen:
            return
        doing("measures what it has learned")
        with torch.no_grad(), stage.averaged_weights():
            images = some_images(self.config)
            stage.after_training(image.to(stage.device, stage.weight_dtype) for image in images)
        self.pictures.draw(trainer, stage)
        self.saver.save(trainer, stage)
        self.saver.finish()
        weights = {name: whole(value) for name, value in stage.inference_weights().items()}
        if trainer.is_global_zero:
            header = {
                "config": run_to_dict(stage.config),
                "extra": stage.checkpoint_extra(),
                "images_seen": stage.images_seen,
            }
            save_final(weights, header, self.folder / run_folder.FINAL_WEIGHTS)
